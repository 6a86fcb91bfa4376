"""One file for each step; once released, none is changed."""
