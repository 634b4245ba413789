"""`run --dashboard` and `resume --dashboard` on a real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from dashboard_drivers import driver, is_running, is_served, write_sweep
from waiting import wait_for

pytest.importorskip("dash")


def test_a_killed_driver_leaves_no_server_and_resume_brings_another(tmp_path: Path) -> None:
    with driver(tmp_path, "run", str(write_sweep(tmp_path)), "--dashboard") as running:
        url = running.address()
        server = running.server(url)
        assert is_served(url)
        running.process.kill()
        running.process.wait()
        wait_for(lambda: not is_running(server), "the end of the server", 30)
    (run,) = (tmp_path / "runs").iterdir()
    with driver(tmp_path, "resume", str(run), "--dashboard") as resumed:
        url = resumed.address()
        server = resumed.server(url)
        assert is_served(url)
        said = resumed.end()
    assert resumed.process.returncode == 0, said
    assert not is_running(server)
    assert f"to see it again: tune-easytrain dashboard {run}\n" in said
