"""Start the main job as a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


class Job:
    """`python -m eiwtrain.run` in its own process group, with its output in a file."""

    def __init__(
        self, folder: Path, *overrides: str, name: str = "tiny", environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.log = folder, folder / f"{name}-{time.time_ns()}.log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eiwtrain.run", str(folder / "tiny.yaml"), f"run.name={name}", *overrides],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Return once the job has printed `text`."""
        end = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None, f"ended without {text!r}:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"no {text!r} within {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.05)

    def wait(self, seconds: float = 180) -> tuple[int, str]:
        """Return the exit code and all that was printed."""
        try:
            return self.process.wait(seconds), self.log.read_text()
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
