"""The report, comparisons, and progress of a run."""
