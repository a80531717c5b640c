"""Check before a run whether it can work, and estimate its time and size."""
