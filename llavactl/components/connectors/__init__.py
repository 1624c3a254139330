"""Connectors: vision features in, language embeddings out."""
