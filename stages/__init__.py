"""One thin command line per DVC stage: load params, load tables, call the library, save tables."""

import l2l_core as l2l_core  # first: it sets how threads behave, before any library starts them
