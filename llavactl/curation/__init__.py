"""Records before training: check, repair, filter, expand, statistics."""
