"""The segmentation network: encoders, guidance tokens, decoder and losses."""
