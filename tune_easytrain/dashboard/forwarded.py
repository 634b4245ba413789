"""A dashboard on the head of a cluster that was made by `ray up`, brought to this machine through ssh.

Run as a program, `python -m tune_easytrain.dashboard.forwarded FILE COMMAND LOCAL_PORT PORT`, it is the
connection: it ends when the command on the head does, and the command is hung up when it ends.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import click

from tune_easytrain.dashboard.access import ALIVE_PATH
from tune_easytrain.dashboard.server import LOOPBACK
from tune_easytrain.errors import BadInputError, TuneEasyTrainError
from tune_easytrain.submit import HEAD_STORAGE, STORAGE_VARIABLE

PATIENCE_SECONDS = 60.0
"""How long the dashboard on the head waits to be asked before it ends: its connection is broken then."""

_BEAT_SECONDS = 10.0
_HEAD_PORTS = range(20000, 30000)  # below those that the kernel gives to connections
_END_SECONDS = 10.0
_LINES_KEPT = 20
_STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ForwardedDashboard:
    """A dashboard that runs on the head, and the connection through which it is reached here."""

    def __init__(self, cluster_file: str, connection: subprocess.Popen[str], local_port: int) -> None:
        self._cluster_file = cluster_file
        self._connection = connection
        self._local_port = local_port
        self._said: deque[str] = deque(maxlen=_LINES_KEPT)
        self.url = f"http://{LOOPBACK}:{local_port}"

    def wait_until_ready(self, port: int) -> None:
        """Wait until the head says that it listens; raises BadInputError where it ends before."""
        assert self._connection.stdout is not None
        for line in self._connection.stdout:
            self._said.append(_STYLES.sub("", line).strip())
            if f"http://{LOOPBACK}:{port}" in line:
                threading.Thread(target=self._listen, daemon=True).start()
                return
        raise BadInputError(
            f"--cluster {self._cluster_file}: the dashboard did not start on the head: {self._reason()}"
        )

    def keep(self) -> TuneEasyTrainError:
        """Let the head know that somebody is here until the connection ends, and return what to tell then."""
        while True:
            with contextlib.suppress(OSError, HTTPException):  # it may come back; if not, ssh ends
                self._ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._connection.wait(_BEAT_SECONDS)
                return TuneEasyTrainError(
                    f"--cluster {self._cluster_file}: the connection to the head has ended: {self._reason()}"
                    "; give the same command again"
                )

    def _ask(self) -> None:
        connection = HTTPConnection(LOOPBACK, self._local_port, timeout=_BEAT_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", ALIVE_PATH)
            connection.getresponse()

    def end(self) -> None:
        """Close the connection, and with it the dashboard on the head."""
        self._connection.terminate()
        try:
            self._connection.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._connection.kill()
            self._connection.wait()

    def _listen(self) -> None:
        assert self._connection.stdout is not None
        for line in self._connection.stdout:
            self._said.append(_STYLES.sub("", line).strip())

    def _reason(self) -> str:
        errors = [line.removeprefix("error: ") for line in self._said if line.startswith("error: ")]
        return (errors or ["\n".join(filter(None, self._said))])[0] or "nothing was said"


@contextmanager
def forwarded(
    cluster_file: str | Path, places: Sequence[str], local_port: int
) -> Iterator[ForwardedDashboard]:
    """Start a dashboard on the head, and end it at the end.

    Args:
        cluster_file: the file that `ray up` was given.
        places: run directories, and folders of them, as the head has them; default: where `submit` puts them.
        local_port: the port of this machine's loopback at which it is to be reached.

    Raises BadInputError where the head cannot be reached, or has no such place.
    """
    if not Path(cluster_file).is_file():
        raise BadInputError(
            f"--cluster {cluster_file}: there is no such file; give the one `ray up` was given"
        )
    port = secrets.choice(_HEAD_PORTS)
    arguments = [str(cluster_file), head_command(places, port), str(local_port), str(port)]
    connection = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    dashboard = ForwardedDashboard(str(cluster_file), connection, local_port)
    try:
        dashboard.wait_until_ready(port)
        yield dashboard
    finally:
        dashboard.end()


def head_command(places: Sequence[str], port: int) -> str:
    """Return the shell command that serves on the head's loopback until nobody asks any more."""
    shown = [_quoted(place) for place in places] or [f'"${{{STORAGE_VARIABLE}:-{_in_home(HEAD_STORAGE)}}}"']
    options = f"--port {port} --no-open --patience {PATIENCE_SECONDS:g}"
    return f"NO_COLOR=1 tune-easytrain dashboard {' '.join(shown)} {options}"


def _quoted(place: str) -> str:
    return f'"$HOME"/{shlex.quote(place[2:])}' if place.startswith("~/") else shlex.quote(place)


def _in_home(place: str) -> str:
    return place.replace("~", "$HOME", 1)


def _connect(cluster_file: str, command: str, local_port: str, port: str) -> None:
    from ray.autoscaler.sdk import configure_logging, run_on_cluster

    # Ray waits for ssh, and kills it when the wait is interrupted.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    configure_logging(log_style="record", verbosity=0)
    try:
        run_on_cluster(cluster_file, cmd=command, port_forward=(int(local_port), int(port)))
    except (click.ClickException, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    _connect(*sys.argv[1:])
