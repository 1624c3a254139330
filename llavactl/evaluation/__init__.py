"""Asking a model what tasks ask, and scoring the answers."""
