"""Which replica a generation goes to, and the streams to and from them."""
