"""Frozen vision backbones: pixels in, patch features out."""
