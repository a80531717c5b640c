"""The training loop, its checkpoints, and the runs of the stages."""
