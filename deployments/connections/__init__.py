"""Connections between the cluster's processes, apart from what they carry."""
