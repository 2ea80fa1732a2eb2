"""A real MLflow server that a test may kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request

from helpers import free_port
from watchers import wait_until


class Server:
    """`mlflow server` over sqlite on the loopback interface; `start` after `kill` brings the same one back."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", self.folder]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(self.port)]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [str(a) for a in [*command, "--workers", 1]],
                stdout=log,
                stderr=log,
                env=os.environ | quiet,
                start_new_session=True,  # it has children, which are ended with it
            )
        wait_until(self._healthy, 180)

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def kill(self):
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _healthy(self):
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        try:
            return urllib.request.urlopen(f"{self.endpoint}/health", timeout=5).status == 200
        except OSError:
            return False
