"""The tables and files between stages: their columns, paths and rounds."""
