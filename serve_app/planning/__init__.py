"""What a model's pool will do under a load: its engine, its scaling and its queues, simulated in virtual time."""
