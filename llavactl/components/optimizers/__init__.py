"""Optimizers: update rules for float32 master weights."""
