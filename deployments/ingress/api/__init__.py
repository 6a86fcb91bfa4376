"""The endpoints, a file or a folder each."""
