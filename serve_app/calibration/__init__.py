"""What the engine of a running model does, measured from outside: the parameters that planning simulates."""
