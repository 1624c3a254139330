"""Conversation templates: what is written, and which of it is trained."""
