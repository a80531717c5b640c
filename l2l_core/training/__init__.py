"""The training loop, its checkpoints, and the runs that stages start."""
