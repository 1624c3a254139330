"""The typed recipe: its frame, loading with file and line, overrides, the JSON schema."""
