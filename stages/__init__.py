"""One thin command line per DVC stage: load params and tables, call the library, save tables."""

import l2l_core as l2l_core  # first, since it configures threads before any library starts them
from l2l_core.errors import explain_early_errors

explain_early_errors()
