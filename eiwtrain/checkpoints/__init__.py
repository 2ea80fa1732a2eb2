"""The checkpoints of a run: what one is (`format`), which stay (`retention`), and how one is written (`writer`).

Import this package, as `eiwtrain.storage`: `checkpoints.newest(root)`. Only `writer` needs torch.distributed, so it is
imported by itself.
"""

from eiwtrain.checkpoints.format import (
    DAMAGED_MANIFEST,
    FIXED,
    FORMAT,
    FREE,
    MANIFEST,
    Checkpoint,
    DamagedCheckpoint,
    Part,
    Survey,
    Unreadable,
    at,
    committed,
    differences,
    folder,
    load,
    newest,
    read_part,
    render,
    section,
    survey,
    tensors_of,
)
from eiwtrain.checkpoints.retention import best, clean, condemn, delete, kept, sweep

__all__ = [
    "DAMAGED_MANIFEST",
    "FIXED",
    "FORMAT",
    "FREE",
    "MANIFEST",
    "Checkpoint",
    "DamagedCheckpoint",
    "Part",
    "Survey",
    "Unreadable",
    "at",
    "best",
    "clean",
    "committed",
    "condemn",
    "delete",
    "differences",
    "folder",
    "kept",
    "load",
    "newest",
    "read_part",
    "render",
    "section",
    "survey",
    "sweep",
    "tensors_of",
]
