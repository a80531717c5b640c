"""The network, from images and sentences to masks."""
