"""`tune-easytrain dashboard` as a process: its address, its pages, its end, and what it refuses."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_runs import epoch, finished, make_run
from test_cli import Ask, ask  # noqa: F401 -- fixtures

pytest.importorskip("dash")


@contextmanager
def started(*arguments: object, cwd: Path | None = None, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tune_easytrain", "dashboard", *map(str, arguments)],
        cwd=cwd, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.fullmatch(r"Dashboard: (http://127\.0\.0\.1:\d+)\n", line)
    assert match is not None, line + process.communicate()[1]
    return match[1]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs", [finished(epoch(1, 0.5))])
    return tmp_path / "runs"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_end(runs: Path, number: int) -> None:
    (run,) = runs.iterdir()
    with started(run) as process:
        url = address_of(process)
        page = get(url)
        assert "_dash-config" in page
        assert "<title>tune_easytrain</title>" in page
        assert "clientside_function" in get(f"{url}/_dash-dependencies")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", "")


def test_the_default_place_is_runs(runs: Path) -> None:
    with started(cwd=runs.parent) as process:
        assert get(address_of(process))


def test_many_places_are_shown_at_once(tmp_path: Path, runs: Path) -> None:
    other = make_run(tmp_path / "other", [finished(epoch(1, 0.5))]).run_dir
    (run,) = runs.iterdir()
    with started(run, Path(other).parent, "--port", 0) as process:
        assert get(address_of(process))


def test_a_browser_is_opened_if_asked_for(runs: Path, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    with started(runs, "--open", BROWSER=f"{browser} %s") as process:
        url = address_of(process)
        get(url)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert opened.read_text() == url


def test_it_ends_with_the_process_that_it_is_for(runs: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with started(runs, "--parent", gone.pid) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + signal.SIGTERM, "", "")


def test_bad_input_ends_with_2_and_one_line(ask: Ask, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("cluster_name: none\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, told in [
            ([], "which sweeps? There is no ./runs here"),
            (["none"], "none is no folder"),
            (["empty", "none"], "none is no folder"),
            (["empty", "--port", port], f"--port {port} is taken by another program"),
            (["empty", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
            (["--cluster", "none.yaml"], "--cluster none.yaml: there is no such file"),
            (["--cluster", cluster, "--host", "203.0.113.7"], "--host: with --cluster"),
            (["--cluster", cluster, "--port", port], f"--port {port} is taken"),
        ]:
            answer = ask("dashboard", *arguments)
            assert (answer.code, answer.out) == (2, ""), arguments
            (line,) = answer.err.splitlines()
            assert line.startswith("error: "), arguments
            assert told in line


def test_a_head_that_is_not_there_is_told(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("cluster_name: none\nprovider: {type: local, head_ip: 203.0.113.7, worker_ips: []}\n"
                       "auth: {ssh_user: nobody}\n")  # fmt: skip
    with started("--cluster", cluster) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), err
    assert err.startswith(f"error: --cluster {cluster}: the dashboard did not start on the head: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("module", ["dash", "waitress"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    ask: Ask, runs: Path, module: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)  # how Python itself notes that there is none
    answer = ask("dashboard", runs)
    assert (answer.code, answer.out) == (2, "")
    assert f"the dashboard needs {module}, which this Python does not have" in answer.err
    assert "pip install 'tune-easytrain[dashboard]'" in answer.err


def test_it_helps_with_an_example(ask: Ask) -> None:  # noqa: F811
    answer = ask("dashboard", "--help")
    assert answer.code == 0
    assert "Example:  tune-easytrain dashboard " in answer.out
    assert "--patience" not in answer.out
    assert "--parent" not in answer.out
