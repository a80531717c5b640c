"""Datasets on disk: readers, importers, downloads, the index and the split."""
