"""What an answer must conform to: read, checked apart, and turned into grammars for the engines."""
