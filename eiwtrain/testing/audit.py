"""Records which samples each step used, so that a test can count them; off unless EIWTRAIN_AUDIT is set.

EIWTRAIN_AUDIT names a local folder, in which every worker keeps a file of JSON lines: one when it starts from a step,
one for each step that it makes. Read in order of time, a start from step s takes back step s and all later ones.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO


class Audit:
    """The file of one worker."""

    def __init__(self, rank: int, world_size: int, step: int) -> None:
        """Note that this rank starts from `step`."""
        self._common = {"rank": rank, "world_size": world_size}
        self._file: TextIO | None = None
        if folder := os.environ.get("EIWTRAIN_AUDIT"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = Path(folder, f"{uuid.uuid4().hex}.jsonl")
            self._file = file.open("a", buffering=1, encoding="utf-8")
            self._write({"restored": step})

    def made(self, step: int, indices: Iterable[int]) -> None:
        """Note that this rank's share of `step` (the first is 0) was the samples `indices` of the training split."""
        if self._file is not None:
            self._write({"step": step, "indices": list(indices)})

    def _write(self, what: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"time": time.time()} | self._common | what) + "\n")
