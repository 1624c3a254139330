"""Predicts the memory and time of a training stage before it is run, from configurations and data alone."""
