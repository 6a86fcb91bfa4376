"""What runs in Serve's controller: how many replicas each deployment needs."""
