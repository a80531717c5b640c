"""RefShapes-VLM: a small multimodal LLM, trained from scratch on RefShapes scenes that no dataset holds."""

import l2l_core as l2l_core  # first: it sets how threads behave, before any library starts them
