"""What runs inside Ray Serve replicas: one folder per deployed role."""
