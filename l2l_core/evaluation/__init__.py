"""Predictions against the truth."""
