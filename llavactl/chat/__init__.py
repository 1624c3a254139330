"""A model that answers: single questions in batches, and conversations that keep their keys and values."""
