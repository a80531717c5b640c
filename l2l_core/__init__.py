"""L2L: learn a referring-expression segmentation model from few labels and many unlabelled pairs."""

__version__ = "0.1.0"
