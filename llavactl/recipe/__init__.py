"""Recipes: typed sections, loading with line numbers, overrides and the JSON schema."""
