"""Records when each part of a start is over, for `benchmarks.start`; off unless EIWTRAIN_TIMELINE is set.

EIWTRAIN_TIMELINE names a local folder, in which every process keeps a file of JSON lines.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def mark(part: str) -> None:
    """Note that this process has just finished `part` of its start."""
    if folder := os.environ.get("EIWTRAIN_TIMELINE"):
        line = {"time": time.time(), "cpu": time.process_time(), "pid": os.getpid(), "part": part}
        with Path(folder, f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
