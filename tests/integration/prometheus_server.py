"""A real Prometheus, from Debian's package, that scrapes what Ray's service discovery file names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from debian_packages import apt_get

_PATIENCE_SECONDS = 60


class NoPrometheusError(Exception):
    """Why this machine cannot have one."""


def find_prometheus(folder: Path) -> Path:
    """Return the program; it is unpacked into `folder` where it is not installed, as that starts a server."""
    if installed := shutil.which("prometheus"):
        return Path(installed)
    if shutil.which("dpkg-deb") is None:
        raise NoPrometheusError("there is no prometheus here, and no dpkg-deb")
    if complaint := apt_get(["download", "prometheus"], folder):
        raise NoPrometheusError(f"there is no prometheus here: {complaint}")
    (package,) = folder.glob("prometheus_*.deb")
    subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
    return folder / "usr/bin/prometheus"


class Prometheus:
    """The server, and its HTTP API."""

    def __init__(self, program: Path, folder: Path, discovery: Path) -> None:
        config = folder / "prometheus.json"  # JSON is YAML
        jobs = [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "1s"}]}
        ]
        config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._url = f"http://{address}/api/v1/"
        self._log = folder / "prometheus.log"
        command = [
            program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        with self._log.open("w") as sink:
            self._process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
        try:
            self._wait_until_ready(f"http://{address}/-/ready")
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, url: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                urllib.request.urlopen(url, timeout=_PATIENCE_SECONDS).close()
                return
            except (urllib.error.URLError, ConnectionError):
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.1)

    def ask(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters)
        request = urllib.request.Request(f"{self._url}{path}?{query}")
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of everything that an expression finds now."""
        found = self.ask("query", query=expression)["result"]
        return [(item["metric"], float(item["value"][1])) for item in found]

    def ever(self, expression: str, seconds: float = 900) -> list[dict[str, Any]]:
        """Every series that it has found in that time, with its values."""
        now = time.time()
        data = self.ask("query_range", query=expression, start=now - seconds, end=now, step=1)
        series: list[dict[str, Any]] = data["result"]
        return series

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
