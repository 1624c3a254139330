"""What llavactl does: a recipe in, a frozen report out. Verbs print nothing; only run calls other verbs."""
