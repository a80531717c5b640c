"""RefShapes-VLM: the embedded multimodal LLM, trained from scratch on RefShapes scenes that no data set holds."""

import l2l_core as l2l_core  # first: it sets how threads behave, before any library starts them
