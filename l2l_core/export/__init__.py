"""What a run learned, in the formats of other tools."""
