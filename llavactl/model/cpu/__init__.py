"""Computations of the language model that are faster on a CPU, with the same result: attention, norms, last layer."""
