"""RefShapes-VLM: the embedded multimodal LLM, trained from scratch on RefShapes scenes that no data set holds."""
