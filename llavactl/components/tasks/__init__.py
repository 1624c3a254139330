"""Benchmarks: what they ask and how answers become scores."""
