"""Compare predictions with the ground truth."""
