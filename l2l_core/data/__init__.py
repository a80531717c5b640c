"""Readers, the embedded data set, splits, and the samples that training sees."""
