"""eiwtrain: distributed training of EIW-Flow (arXiv 2407.04958) and its kin."""

__version__ = "0.1.0"
