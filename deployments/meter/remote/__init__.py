"""A meter as the processes that need one reach it."""
