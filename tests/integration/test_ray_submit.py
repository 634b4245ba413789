"""`ray up`, `ray submit`, `ray down` with cluster/onprem.yaml on a host that is reached through ssh alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import ray
from lone_hosts import LoneHost, NoHostsError, lone_hosts
from test_example import SMALL_TRIAL
from waiting import wait_for

ROOT = Path(__file__).parents[2]
ENVIRONMENT = "tune_easytrain_env"
SMALL = [
    "grid_search.grid.model.type=[s3d]",
    "grid_search.grid.hp.batch_size=[8]",
    *SMALL_TRIAL,
]
OVERRIDES = [word for override in SMALL for word in ("--set", f"'{override}'")]
CLUSTER_FILE = "cluster/onprem.yaml"
SHOWN_RUNS = ROOT / "tests" / "shown_runs.py"


class Laptop:
    """The machine with the repository, from which a cluster is started and used."""

    def __init__(self, host: LoneHost) -> None:
        self.host = host
        self.checkout = host.home / "checkout"
        self.checkout_from_here = host.home_from_here / "checkout"

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in the repository."""
        script = f'cd {self.checkout} && PATH={self.host.home / ENVIRONMENT}/bin:$PATH && exec "$@"'
        return subprocess.Popen(
            self.host.inside(["sh", "-c", script, "sh", *command]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start("ray", "submit", CLUSTER_FILE, "examples/ucf101.py", "--", *arguments)

    def run(self, *command: str) -> str:
        process = self.start(*command)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        return output

    def on_head(self, command: str) -> str:
        return self.run("ray", "exec", CLUSTER_FILE, command)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[LoneHost]]:
    pytest.importorskip("aiohttp", reason="the head of a cluster needs ray[default]")
    try:
        with lone_hosts(tmp_path / "hosts", ["head", "laptop"]) as hosts:
            yield hosts
    except NoHostsError as error:
        pytest.skip(str(error))


def download_build_tools(folder: Path) -> Path:
    """What pip builds a package with, for hosts that do not reach PyPI."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), "setuptools>=77"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"PyPI is out of reach: {done.stderr.strip()}")
    return folder


def make_environment(host: LoneHost, wheels: Path) -> Path:
    """A virtual environment with the packages of this one, except ours, as if pip had installed them.

    Returns its folder of packages.
    """
    environment = host.home / ENVIRONMENT
    host.run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    inside = host.home_from_here / ENVIRONMENT
    ray_program = inside / "bin" / "ray"
    ray_program.write_text(f"#!{environment}/bin/python\nfrom ray.scripts.scripts import main\nmain()\n")
    ray_program.chmod(0o755)
    settings = host.home_from_here / ".config" / "pip" / "pip.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[global]\nno-index = true\nfind-links = {wheels}\n")
    (packages,) = inside.glob("lib/python3*/site-packages")
    (packages / "here.pth").write_text(
        "".join(f"{path}\n" for path in sys.path if path.endswith("-packages"))
    )
    return packages


def check_out(checkout: Path, folder: Path) -> None:
    """The repository on the machine of the one who calls `ray submit`, with what is theirs set."""
    checkout.mkdir()
    for name in ("cluster", "configs", "examples", "tune_easytrain"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    replace(checkout / "cluster" / "settings.sh", {
        "s3://my-bucket": str(folder / "bucket"),
        "RAY_VERSION=2.60.0": f"RAY_VERSION={ray.__version__}",
    })  # fmt: skip
    replace(checkout / "cluster" / "onprem.yaml", {
        # ssh keeps connections open in /tmp by this name, which other tests of this machine share.
        "cluster_name: tune-easytrain-onprem": f"cluster_name: test-{os.getpid()}",
        "[10.0.0.2, 10.0.0.3]": "[]",
        "ssh_user: ubuntu": "ssh_user: root",
        "~/.ssh/id_ed25519": str(folder / "hosts" / "key"),
    })  # fmt: skip


def replace(path: Path, values: dict[str, str]) -> None:
    text = path.read_text()
    for old, new in values.items():
        assert text.count(old) == 1, f"{path}: {old}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.timeout(900)
def test_ray_up_submit_and_down(hosts: list[LoneHost], tmp_path: Path) -> None:
    head, _ = hosts
    laptop = prepare(hosts, tmp_path)
    laptop.run("ray", "up", "--yes", CLUSTER_FILE)
    check_the_sweep_outlives_the_connection(laptop)
    check_its_frame_comes_home(laptop)
    check_the_dashboard_is_forwarded(laptop, head)
    check_a_broken_connection_leaves_no_dashboard(laptop, head)
    check_without_the_token_nothing_is_told(head)
    assert head.processes("raylet")
    laptop.run("ray", "down", "--yes", CLUSTER_FILE)
    assert not head.processes("raylet")
    assert not head.processes("gcs_server")


def prepare(hosts: list[LoneHost], folder: Path) -> Laptop:
    """The hosts before `ray up`, and the repository with what is ours set in it."""
    head, mine = hosts
    laptop = Laptop(mine)
    script = ROOT / "examples" / "make_demo_data.py"
    subprocess.run([sys.executable, script, folder / "bucket" / "UCF-101"], check=True, capture_output=True)
    wheels = download_build_tools(folder / "wheels")
    make_environment(head, wheels)
    packages = make_environment(mine, wheels)
    check_out(laptop.checkout_from_here, folder)
    (packages / "ours.pth").write_text(f"{laptop.checkout}\n")
    program = mine.home_from_here / ENVIRONMENT / "bin" / "tune-easytrain"
    program.write_text(
        f"#!{mine.home / ENVIRONMENT}/bin/python\nfrom tune_easytrain.cli import main\nmain()\n"
    )
    program.chmod(0o755)
    return laptop


def check_the_sweep_outlives_the_connection(laptop: Laptop) -> None:
    submitting = laptop.submit(*OVERRIDES)
    assert submitting.stdout is not None
    said = ""
    while not re.search(r"^trial_00000 .*: started", said, re.MULTILINE):
        line = submitting.stdout.readline()
        assert line, said
        said += line
    job = re.search(r"^Job (\S+):", said, re.MULTILINE)
    assert job is not None, said
    for process in laptop.host.processes("ssh "):
        laptop.host.run(["kill", "-KILL", str(process)])
    submitting.communicate()
    assert submitting.returncode != 0

    assert "finished" not in said
    # As the one who comes back in the morning; it fails unless the sweep ended with 0.
    log = laptop.on_head(f"tune-easytrain logs {job[1]} --follow --address auto")
    assert re.search(r"^trial_00000 .*: finished", log, re.MULTILINE)


def check_its_frame_comes_home(laptop: Laptop) -> None:
    laptop.run("tune-easytrain", "results", "--cluster", CLUSTER_FILE, "--csv", "frame.csv")
    (row,) = pd.read_csv(laptop.checkout_from_here / "frame.csv").to_dict("records")
    assert row["model.type"] == "s3d"
    assert row["state"] == "finished"
    assert row["effective_batch_size"] == 10
    assert row["optimizer_steps"] == 4


class Showing:
    """`tune-easytrain dashboard --cluster` on the laptop, once it has told its address."""

    def __init__(self, laptop: Laptop) -> None:
        self._laptop = laptop
        self.process = laptop.start("tune-easytrain", "dashboard", "--cluster", CLUSTER_FILE)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.fullmatch(r"Dashboard: (http://127\.0\.0\.1:\d+)\n", line)
        assert match is not None, line + self.process.communicate()[0]
        self.url = match[1]

    def send(self, signal: str) -> None:
        (pid,) = self._laptop.host.processes("^[^ ]*python[^ ]* [^ ]*tune-easytrain dashboard --cluster")
        self._laptop.host.run(["kill", f"-{signal}", str(pid)])


def check_the_dashboard_is_forwarded(laptop: Laptop, head: LoneHost) -> None:
    showing = Showing(laptop)
    python = str(laptop.host.home / ENVIRONMENT / "bin" / "python")
    shown = laptop.host.run([python, "-c", SHOWN_RUNS.read_text(), showing.url])
    assert "<title>tune_easytrain</title>" in shown
    assert re.search(r"ucf101\w*_\d{4}-\d\d-\d\d", shown)
    assert head.processes("tune-easytrain dashboard")
    showing.send("TERM")
    output = showing.process.communicate(timeout=60)[0]
    assert (showing.process.returncode, output) == (143, "")
    wait_for(lambda: not head.processes("tune-easytrain dashboard"), "the end of the dashboard", 30)
    assert not laptop.host.processes("tune-easytrain dashboard")


def check_a_broken_connection_leaves_no_dashboard(laptop: Laptop, head: LoneHost) -> None:
    """Nothing comes through any more, and neither side is told."""
    showing = Showing(laptop)
    stopped = [str(pid) for pid in laptop.host.processes("^ssh[ :]")]
    laptop.host.run(["kill", "-STOP", *stopped])
    assert head.processes("tune-easytrain dashboard")
    wait_for(lambda: not head.processes("tune-easytrain dashboard"), "the end of the dashboard", 150)
    laptop.host.run(["kill", "-CONT", *stopped])
    output = showing.process.communicate(timeout=60)[0]
    assert showing.process.returncode == 1, output
    assert "the connection to the head has ended" in output


def check_without_the_token_nothing_is_told(head: LoneHost) -> None:
    python = str(head.home / ENVIRONMENT / "bin" / "python")
    command = [python, "-m", "tune_easytrain", "status", "--address", "http://127.0.0.1:8265"]
    asked = subprocess.run(
        head.inside(["env", "RAY_AUTH_MODE=disabled", *command]), capture_output=True, text=True, check=False
    )
    assert asked.returncode == 2
    assert "refuses" in asked.stderr
