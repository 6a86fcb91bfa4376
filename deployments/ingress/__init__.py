"""Ingress: HTTP in, server-sent events out. Imports neither torch nor vllm."""
