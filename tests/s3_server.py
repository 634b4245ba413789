"""An S3-speaking server on loopback (moto's, in its own process), and a gate to it that can be shut."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret-0123456789"}
_PATIENCE_SECONDS = 60
_CHUNK_BYTES = 1 << 16


class S3Server:
    """The server. With `checks_access` it knows no user, so it refuses everybody."""

    def __init__(self, *, checks_access: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        environment = dict(os.environ) | ({"INITIAL_NO_AUTH_ACTION_COUNT": "0"} if checks_access else {})
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self._request("GET", "moto-api/")
                return
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.1)

    def url(self, place: str, port: int | None = None) -> str:
        """The URL of `bucket/folder` that needs no environment to be found."""
        return f"s3://{place}?endpoint_override=127.0.0.1:{port or self.port}&scheme=http"

    def make_bucket(self, name: str) -> None:
        self._request("PUT", name)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _request(self, method: str, path: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", method=method)
        urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS).close()


class Gate:
    """A port that leads to a server. While it is shut nothing listens there, and connections are cut."""

    def __init__(self, server: S3Server) -> None:
        self._target = ("127.0.0.1", server.port)
        self._sockets: list[socket.socket] = []
        self.port = 0
        self.open()

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        while self._sockets:
            each = self._sockets.pop()
            with contextlib.suppress(OSError):  # ended by the other side
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_forward, args=(source, sink), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
