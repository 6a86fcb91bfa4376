"""What runs outside the replicas: configuration, application builder, command line."""
