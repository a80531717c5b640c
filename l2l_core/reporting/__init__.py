"""Report, comparison of experiments, and progress of a run."""
