"""Teachers: what writes instruction data about a picture it is told of in words."""
