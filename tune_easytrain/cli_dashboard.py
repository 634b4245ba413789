"""The command that serves the live dashboard: `dashboard`.

It goes on until Ctrl-C (exit code 130) or SIGTERM (143) ends it.
"""

from __future__ import annotations

import os
import signal
import sys
import webbrowser
from contextlib import closing
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tune_easytrain.cli_options import to_out
from tune_easytrain.errors import BadInputError

DEFAULT_PLACE = "runs"
LOOPBACK = "127.0.0.1"

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
_SIGNAL_BASE = 128  # as a shell has it


def dashboard(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN_DIR | STORAGE]...",
            help="Run directories, and folders or URLs that hold them; default: ./runs.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The interface to listen on; any but loopback needs the token in the address.")
    ] = LOOPBACK,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Default: the first free one from 8300 on.", show_default=False),
    ] = None,
    open_browser: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open", help="Open it in a browser; default: on a desktop, if typed at a terminal."
        ),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Show sweeps on the head of the cluster that `ray up FILE` started; default: all it has.",
        ),
    ] = None,
    patience: Annotated[float | None, typer.Option(hidden=True)] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Show sweeps as live web pages, while they run and afterwards, until Ctrl-C."""
    if parent is not None:
        _end_with(parent)
    try:
        if cluster is not None:
            _forward(cluster, places or [], host, port, open_browser)
        number = _serve(places or _default_places(), host, port, open_browser, patience)
    except KeyboardInterrupt:
        number = signal.SIGINT
    raise typer.Exit(_SIGNAL_BASE + number)


def add_commands(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command(epilog="Example:  tune-easytrain dashboard runs")(dashboard)


def _serve(
    places: list[str], host: str, port: int | None, open_browser: bool | None, patience: float | None
) -> int:
    from tune_easytrain.optional_packages import check_command_packages

    check_command_packages("dashboard")
    from tune_easytrain.dashboard.app import build_app
    from tune_easytrain.dashboard.server import DashboardServer, listen

    with closing(listen(host, port)) as listener:
        server = DashboardServer(build_app(places), listener, patience_seconds=patience)
        _announce(server.url, open_browser)
        return server.run()


def _forward(
    cluster: Path, places: list[str], host: str, port: int | None, open_browser: bool | None
) -> NoReturn:
    from tune_easytrain.dashboard.forwarded import forwarded
    from tune_easytrain.dashboard.server import listen

    if host != LOOPBACK:
        raise BadInputError(
            "--host: with --cluster the dashboard comes to this machine's loopback; leave it out"
        )
    with closing(listen(port=port)) as listener:
        local_port = listener.getsockname()[1]
    signal.signal(signal.SIGTERM, _end_of_sigterm)
    with forwarded(cluster, places, local_port) as there:
        _announce(there.url, open_browser)
        error = there.keep()
    raise error


def _announce(url: str, open_browser: bool | None) -> None:
    from tune_easytrain.dashboard_process import ANNOUNCEMENT

    to_out(f"{ANNOUNCEMENT}{url}")
    sys.stdout.flush()
    if open_browser is None:
        open_browser = sys.stdout.isatty() and any(os.environ.get(name) for name in _DISPLAYS)
    if open_browser:
        webbrowser.open(url)


def _default_places() -> list[str]:
    if not Path(DEFAULT_PLACE).is_dir():
        raise BadInputError(
            f"which sweeps? There is no ./{DEFAULT_PLACE} here: give a run directory, or a folder or URL "
            "that holds them"
        )
    return [DEFAULT_PLACE]


def _end_with(parent: int) -> None:
    """End when the process that started this one does; at once where it is gone already."""
    from tune_easytrain.orphans import end_with_parent

    end_with_parent()
    if os.getppid() != parent:
        raise typer.Exit(_SIGNAL_BASE + signal.SIGTERM)


def _end_of_sigterm(number: int, frame: object) -> NoReturn:
    raise typer.Exit(_SIGNAL_BASE + number)
