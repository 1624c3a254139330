"""What a run looks like to a person: the loss curve and one page, made from what the run folder holds."""
