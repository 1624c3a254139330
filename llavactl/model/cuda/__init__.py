"""Computations of the language model for CUDA devices."""
