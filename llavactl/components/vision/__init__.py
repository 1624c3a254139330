"""Frozen vision encoders: pixels to patch features."""
