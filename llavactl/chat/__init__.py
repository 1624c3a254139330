"""Text generation for chat and evaluation: single prompts, batches, and conversations with a key/value cache."""
