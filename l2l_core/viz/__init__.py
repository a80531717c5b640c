"""Pictures and curves."""
