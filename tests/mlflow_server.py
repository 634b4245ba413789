"""MLflow's own server on loopback, with its database in a folder; it can be stopped and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

_PATIENCE_SECONDS = 250


class MlflowServer:
    """The server; always at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1",
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = self._folder / "server.log"
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdout=sink, stderr=sink, start_new_session=True
            )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=_PATIENCE_SECONDS).close()
                return
            except (urllib.error.URLError, ConnectionError):
                assert self._process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"MLflow's server does not start: {log.read_text()}"
                time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # it starts others
            self._process.wait()
            self._process = None
