"""Masks for a user's own images: files and the demo page."""
