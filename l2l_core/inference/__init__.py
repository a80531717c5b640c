"""Masks for a user's own images: the public Predictor, files and the demo page."""
