"""What parts cost, each measured by itself."""
