"""Measurements, one script each; the rows of their results lie in results/."""

import l2l_core as l2l_core  # first: it sets how threads behave, before any library starts them
