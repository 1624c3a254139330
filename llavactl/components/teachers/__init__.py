"""Teachers: they write instruction data about images, from captions and boxes."""
