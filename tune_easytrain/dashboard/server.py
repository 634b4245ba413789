"""The server of the dashboard: where it listens, its address, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import secrets
import signal
import socket
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from tune_easytrain.dashboard.access import Access
from tune_easytrain.errors import BadInputError

if TYPE_CHECKING:
    from dash import Dash

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8300

_PORTS_TRIED = 100
_NUM_THREADS = 8


def listen(host: str = LOOPBACK, port: int | None = None) -> socket.socket:
    """Return a socket that takes connections.

    Args:
        host: the address of an interface of this machine, or a name that leads to it.
        port: 0 for any that is free; None takes the first free one from `DEFAULT_PORT` on.

    Raises BadInputError where that cannot be had, and says what to do.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise BadInputError(f"--host {host}: {error}; give an address of this machine") from None
    ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED)
    for candidate in ports:
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address[0], candidate))
            listener.listen()
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                continue
            raise BadInputError(f"cannot listen on {host}, port {candidate}: {error.strerror}") from None
        return listener
    if port is None:
        raise BadInputError(f"all ports from {ports[0]} to {ports[-1]} are taken; give a free one as --port")
    raise BadInputError(
        f"--port {port} is taken by another program; give another one, or leave --port out for a free one"
    )


class DashboardServer:
    """Serves the dashboard, on loopback to this machine's users, elsewhere to who has the token.

    Args:
        dashboard: its pages.
        listener: where to take connections, as `listen` returns it.
        patience_seconds: end when nobody has asked for anything for so long; None: never.
    """

    def __init__(
        self, dashboard: Dash, listener: socket.socket, *, patience_seconds: float | None = None
    ) -> None:
        self._listener = listener
        self._address, self._port = listener.getsockname()[:2]
        is_loopback = ipaddress.ip_address(self._address).is_loopback
        self._token = None if is_loopback else secrets.token_urlsafe(32)
        self._access = Access(
            dashboard.server.wsgi_app,
            token=self._token,
            port=self._port,
            script_hashes=dashboard.csp_hashes(),
        )
        self._patience_seconds = patience_seconds

    @property
    def url(self) -> str:
        """The address to open, with the token where one is needed."""
        address = ipaddress.ip_address(self._address)
        host = socket.gethostname() if address.is_unspecified else self._address
        url = f"http://{f'[{host}]' if ':' in host else host}:{self._port}"
        return url if self._token is None else f"{url}/?token={self._token}"

    def run(self) -> int:
        """Serve until SIGINT or SIGTERM, and return its number; for the main thread of a process."""
        import waitress  # not needed by who only forwards a port

        received: list[int] = []

        def end(number: int, frame: FrameType | None) -> None:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_IGN)  # it is ending
            received.append(number)
            raise KeyboardInterrupt  # which waitress ends in good order for

        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it tells of every wait
        server = waitress.create_server(
            self._access, sockets=[self._listener], threads=_NUM_THREADS, ident=None
        )
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, end)
        if self._patience_seconds is not None:
            threading.Thread(target=self._end_when_unasked, daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):  # one that came before waitress's loop
            server.run()
        return received[0]

    def _end_when_unasked(self) -> None:
        patience = self._patience_seconds or 0.0
        while (left := self._access.last_asked + patience - time.monotonic()) > 0:
            time.sleep(left)
        os.kill(os.getpid(), signal.SIGTERM)
