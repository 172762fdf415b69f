"""What training an adapter takes: the loop, the levels and their teacher, the states to train on, checkpoints."""
