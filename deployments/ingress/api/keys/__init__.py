"""Keys and teams, for the admin key."""
