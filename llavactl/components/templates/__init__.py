"""Conversation templates: the text of a conversation, and which parts of it are target tokens."""
