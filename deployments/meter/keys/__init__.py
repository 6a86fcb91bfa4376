"""API keys and teams."""
