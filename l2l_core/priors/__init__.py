"""Semantic-spatial priors from a multimodal LLM: backends, prompt and parser."""
