"""Training: the loop, what is frozen, the optimiser and its schedule, checkpoints, metrics."""
