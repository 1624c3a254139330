"""Training a stage: initial model, training loop, optimizer, checkpoints, saving, report."""
