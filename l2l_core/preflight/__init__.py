"""What can be known before a run: whether it can work, and about how long and how large it will be."""
