"""Shared utilities: masks, boxes, images, metrics, devices, threads, files."""
