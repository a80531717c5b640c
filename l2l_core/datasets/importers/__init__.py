"""Converters from annotations of other tools to JSON lines for `dataset`."""
