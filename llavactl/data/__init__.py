"""Records to batches: opening images, encoding conversations, planning steps, joining samples with features."""
