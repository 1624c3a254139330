"""Curation of training records: check, repair, filter, expand, statistics."""
