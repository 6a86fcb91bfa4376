"""HTTP beneath the endpoints: connections, bodies, queries."""
