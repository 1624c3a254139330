"""What a plugin can add, one folder a kind. Components know the core alone."""
