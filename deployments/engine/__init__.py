"""Engine: the replica pool of one model, on vLLM or on the simulated engine."""
