"""L2L: learn a referring-expression segmentation model from few labels and many unlabelled pairs."""

from l2l_core.threads import set_thread_policy

__version__ = "0.1.0"

set_thread_policy()  # here, since Python runs this file before any other of the package
