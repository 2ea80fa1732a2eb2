"""eiwtrain: distributed training of EIW-Flow (arXiv 2407.04958) and related flows."""

__version__ = "0.1.0"
