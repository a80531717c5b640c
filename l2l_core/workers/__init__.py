"""Chunks of a stage's work, computed in this process, in several, or on a Ray cluster."""
