"""What keys and teams may use, and what is reserved for requests under way."""
