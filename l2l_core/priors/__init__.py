"""Raw response -> prior -> soft proposal."""
