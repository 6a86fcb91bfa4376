"""What an endpoint says of itself, and the words for it."""
