"""The dashboard beside a sweep: it is told, it is gone afterwards, and nothing of it harms the sweep."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from dashboard_drivers import SECONDS, driver, is_running, is_served, write_sweep
from listeners import listeners_of
from made_runs import epoch, finished, make_run
from waiting import wait_for

from tune_easytrain import sweep
from tune_easytrain.dashboard_process import dashboard_shown
from tune_easytrain.errors import BadInputError
from tune_easytrain.run_directory import RunDirectory

pytest.importorskip("dash")


def test_a_sweep_has_its_dashboard_and_takes_it_along(tmp_path: Path) -> None:
    with driver(tmp_path, "run", str(write_sweep(tmp_path)), "--debug", "--dashboard") as running:
        url = running.address()
        assert is_served(url)
        server = running.server(url)
        said = running.end()
    assert running.process.returncode == 0, said
    assert not is_running(server)
    (run,) = (tmp_path / "runs").iterdir()
    assert f"Dashboard: {url}/run/{run.name}\n" in said  # the sweep's own overview
    assert (
        f"The dashboard has ended with the sweep; to see it again: tune-easytrain dashboard {run}\n" in said
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_driver_ends_no_server_is_left(tmp_path: Path, number: int) -> None:
    with driver(tmp_path, "run", str(write_sweep(tmp_path)), "--debug", "--dashboard") as running:
        url = running.address()
        server = running.server(url)
        assert os.getpgid(server) != os.getpgid(running.process.pid)  # Ctrl-C of a terminal is for the sweep
        running.process.send_signal(number)
        running.process.wait(SECONDS)
        assert running.process.returncode != 0
        wait_for(lambda: not is_running(server), "the end of the server", 30)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(make_run(tmp_path, [finished(epoch(1, 0.5))]).run_dir)


def test_one_that_cannot_start_is_told_and_harms_nothing(run: RunDirectory) -> None:
    said: list[str] = []
    run.path.rename(run.path.with_name("elsewhere"))
    with dashboard_shown(run, said.append):
        wait_for(lambda: said, "what went wrong", SECONDS)
    assert said[0].startswith(f"The dashboard has ended ({run.path} is no folder")
    assert said[0].endswith(f"the sweep goes on; to start it: tune-easytrain dashboard {run.path}")


def test_a_server_that_dies_is_told(run: RunDirectory) -> None:
    said: list[str] = []
    with dashboard_shown(run, said.append):
        wait_for(lambda: said, "its address", SECONDS)
        assert said[0].startswith("Dashboard: http://127.0.0.1:")
        assert said[0].endswith(f"/run/{run.path.name}")
        port = urlsplit(said[0].removeprefix("Dashboard: ")).port
        (server,) = [each.pid for each in listeners_of(os.getpid()) if each.port == port]
        os.kill(server, signal.SIGKILL)
        wait_for(lambda: len(said) == 2, "that it is gone", 30)
    assert said[1].startswith("The dashboard has ended (")


def test_the_end_comes_before_it_has_started(run: RunDirectory) -> None:
    said: list[str] = []
    with dashboard_shown(run, said.append):
        pass
    assert said == [
        f"The dashboard has ended with the sweep; to see it again: tune-easytrain dashboard {run.path}"
    ]


@pytest.mark.parametrize("debug", [False, True])
def test_without_its_packages_nothing_is_run(
    tmp_path: Path, debug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "waitress", None)
    monkeypatch.chdir(tmp_path)
    file = write_sweep(tmp_path)
    with pytest.raises(BadInputError, match=r"needs waitress.*'tune-easytrain\[dashboard\]'"):
        sweep.run(file, debug=debug, dashboard=True)
    assert not (tmp_path / "runs").exists()


def test_resume_without_its_packages_is_refused_too(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dash", None)
    with pytest.raises(BadInputError, match="the dashboard needs dash"):
        sweep.resume(run.path, dashboard=True)
