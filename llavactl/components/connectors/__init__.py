"""Connectors: map vision features to language-model embeddings."""
