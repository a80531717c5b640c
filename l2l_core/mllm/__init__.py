"""Image and sentence -> raw response of a multimodal LLM, of a recording, or of a simulation."""
