"""Training, teachers, checkpoints and resuming."""
