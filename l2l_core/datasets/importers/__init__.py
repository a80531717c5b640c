"""Annotations of other tools as lines of JSON that `dataset` takes."""
