"""What the head is asked to run, and keeping it; `integration/test_ray_submit.py` has a real head and ssh."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from test_server import serve

from tune_easytrain.dashboard import forwarded
from tune_easytrain.dashboard.forwarded import PATIENCE_SECONDS, ForwardedDashboard, head_command


def arguments(command: str, folder: Path, **variables: str) -> list[str]:
    """What `tune-easytrain` is called with where a shell runs the command."""
    program = folder / "tune-easytrain"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": "/home/a b", **variables}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


OPTIONS = ["--port", "20001", "--no-open", "--patience", f"{PATIENCE_SECONDS:g}"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["/shared/runs/x", "s3://bucket/runs"], ["/shared/runs/x", "s3://bucket/runs"]),
        (["~/my runs"], ["/home/a b/my runs"]),
        (["$(touch owned)", "a;b", "~/`id`"], ["$(touch owned)", "a;b", "/home/a b/`id`"]),
        ([], ["/home/a b/tune_easytrain_runs"]),
    ],
)
def test_places_reach_the_head_as_they_were_given(tmp_path: Path, given: list[str], shown: list[str]) -> None:
    assert arguments(head_command(given, 20001), tmp_path) == ["dashboard", *shown, *OPTIONS]


def test_without_a_place_it_is_where_the_cluster_keeps_its_runs(tmp_path: Path) -> None:
    told = arguments(head_command([], 20001), tmp_path, TUNE_EASYTRAIN_STORAGE="s3://my bucket/runs")
    assert told == ["dashboard", "s3://my bucket/runs", *OPTIONS]


def test_the_head_is_kept_until_the_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarded, "_BEAT_SECONDS", 0.5)
    head = serve("127.0.0.1", "0", "5")
    with subprocess.Popen(["sleep", "10"], text=True) as connection:
        error = ForwardedDashboard("cluster.yaml", connection, head.port).keep()
    assert head.process.poll() is None
    assert str(error).startswith("--cluster cluster.yaml: the connection to the head has ended: ")
    assert head.process.wait(60) == 128 + signal.SIGTERM
    head.process.communicate()


def test_a_head_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarded, "_BEAT_SECONDS", 0.1)
    with subprocess.Popen(["sleep", "1"], text=True) as connection:
        error = ForwardedDashboard("cluster.yaml", connection, 1).keep()
    assert "give the same command again" in str(error)
