"""The network that maps images and sentences to masks."""
