"""Sweeps as jobs of a real head, started for this module, which asks for a token."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tune_easytrain as te
from tune_easytrain.jobs_client import _check_is_ray
from tune_easytrain.trial_record import TrialState

pytest.importorskip("aiohttp", reason="a head needs ray[default]")


CLI = [sys.executable, "-m", "tune_easytrain"]
TOKEN = "a" * 40
PATIENCE_SECONDS = 400
TOYS = Path(__file__).parents[1] / "toys.py"

SWEEP = """
name: toy
task: tasks/gated.py:build_task
config: {data: {num_samples: 20}}
grid_search: {grid: {model.type: [small, large]}}
batch: {effective_batch_size: 10, probe: "off"}
train: {epochs: 2}
run: {metric: val_accuracy, mode: max, max_concurrent: 1}
"""

GATED = """
import dataclasses, time
from pathlib import Path
import toys

def build_task(config):
    task = toys.build_task(config)
    def loss(model, batch):
        while config["model"]["type"] == "large" and not Path(config["gate"]).exists():
            time.sleep(0.05)
        return task.loss(model, batch)
    return dataclasses.replace(task, loss=loss)
"""
"""A task whose second trial waits for a file, so that a test knows where the sweep stands."""

# What jobs end with, and a connection that is cut again and again while one speaks.
SCRIPT = """
import json, socket, sys, threading, time
from tune_easytrain.jobs import follow
from tune_easytrain.submit import submit_command

port = int(sys.argv[1])
address = f"http://127.0.0.1:{port}"

class Proxy(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.server, self.open, self.cuts = socket.create_server(("127.0.0.1", 0)), [], 0
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
    def run(self):
        while True:
            near, _ = self.server.accept()
            far = socket.create_connection(("127.0.0.1", port))
            self.open += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(source, target), daemon=True).start()
    def pump(self, source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass
    def cut(self):
        self.cuts += 1
        while self.open:
            try:
                self.open.pop().shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

proxy = Proxy()
proxy.start()
speaking = "for i in $(seq 20); do echo $WORD $i end; sleep 0.2; done; exit 2"
speaking, killed, done = (
    submit_command(["sh", "-c", command], address=address, name="end", env={"WORD": "line"})
    for command in (speaking, "kill -9 $$", "true")
)
said = ""

def hear(text):
    global said
    said += text
    if proxy.cuts < 2 and f"line {6 * (proxy.cuts + 1)} " in said:
        proxy.cut()

codes = [follow(speaking, address=proxy.address, write=hear)]
codes += [follow(job, address=address, write=len) for job in (killed, done)]
print(json.dumps({"codes": codes, "said": said, "cuts": proxy.cuts}))
"""


@dataclass(frozen=True)
class Head:
    """A head node: its dashboard's port, the home folder of its jobs, and the environment of its users."""

    port: int
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def story(self) -> str:
        """What there is to read of it when a test fails."""
        state = "runs" if self.process.poll() is None else f"ended with {self.process.returncode}"
        logs = [*sorted(self.home.glob("ray/session_*/logs/*.err")), self.home / "head.log"]
        ends = "".join(f"\n--- {log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)
        return f"the head {state}{ends}"

    def start(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        """Start the command line in a terminal of its own, as it were."""
        return subprocess.Popen(
            [*CLI, *map(str, arguments), "--address", self.address],
            env=self.environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `pytest &` ignores it
        )  # fmt: skip

    def ask(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def free_port() -> int:
    """A port that nobody has, nor will be given by the kernel before its process binds to it."""
    while True:
        port = random.randrange(21_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def processes_of(folder: Path) -> list[int]:
    """The processes that were started with a file in the folder: this head's, and no other's."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="te_", dir="/tmp"))  # sockets in it need a short path
    log, port = folder / "head.log", free_port()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = plain | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2",
            "--temp-dir", str(folder / "ray"), "--port", "0", "--dashboard-port", str(port),
            "--dashboard-agent-listen-port", "0", "--ray-client-server-port", str(free_port()),
            "--object-store-memory", "100000000",
        ],
        env=environment | {"HOME": str(folder)}, stdout=log.open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        head = Head(port, folder, environment, process)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert process.poll() is None, log.read_text()
            try:
                _check_is_ray(head.address)
                break
            except te.BadInputError:
                assert time.monotonic() < deadline, "the head does not answer"
                time.sleep(0.2)
        yield head
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
        for pid in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    for name in ("sweeps", "tasks"):
        (tmp_path / name).mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "tasks/gated.py").write_text(GATED)
    shutil.copy(TOYS, tmp_path / "tasks")
    (tmp_path / "sweeps/toy.yaml").write_text(SWEEP)
    return tmp_path / "sweeps/toy.yaml"


def read_until(head: Head, process: subprocess.Popen[str], text: str) -> None:
    said = []
    for line in process.stdout or ():
        said.append(line)
        if text in line:
            return
    _, err = process.communicate()
    pytest.fail(f"{text!r} was not said; exit code {process.returncode}: {''.join(said)}{err}{head.story()}")


def names_in_dashboard(head: Head) -> list[str]:
    """What Ray's own dashboard calls the actors of a sweep's trials."""
    request = urllib.request.Request(
        f"{head.address}/api/v0/actors?detail=1", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
        actors = json.load(answer)["data"]["result"]["result"]
    return [actor["repr_name"] for actor in actors if actor["class_name"] == "SweepTrial"]


def job_of(submitting: subprocess.Popen[str]) -> str:
    """The job of a `submit` that has been killed: what it said at its start names it."""
    _, said = submitting.communicate(timeout=PATIENCE_SECONDS)
    (job_id,) = re.findall(r"^Job (toy-\w+) runs on the cluster", said, re.MULTILINE)
    return str(job_id)


def test_a_sweep_outlives_those_who_watch_it_and_is_stopped_so_that_it_can_go_on(
    head: Head, sweep_file: Path, local_ray: None
) -> None:
    gate = sweep_file.with_name("gate")
    submitting = head.start("submit", sweep_file, "--set", f"config.gate={gate}")
    read_until(head, submitting, "epoch 1")
    submitting.kill()
    job_id = job_of(submitting)

    watching = head.start("logs", job_id, "--follow")
    read_until(head, watching, "trial_00001 (large): started")
    assert "toy: trial_00000 and later trials" in names_in_dashboard(head)
    watching.send_signal(signal.SIGINT)
    _, told = watching.communicate(timeout=PATIENCE_SECONDS)
    assert watching.returncode == 130
    assert f"tune-easytrain logs {job_id} --follow --address {head.address}" in told

    stopped = head.ask("stop", job_id)
    assert stopped.returncode == 0, stopped.stderr
    assert f"{job_id} is stopped" in stopped.stdout
    again = shlex.split(stopped.stdout.splitlines()[-1].partition(": ")[2])
    run_dir = Path(again[again.index("--resume") + 1])
    assert again == [
        "tune-easytrain", "submit", str(sweep_file), "--resume", str(run_dir), "--address", head.address,
    ]  # fmt: skip
    (state,) = json.loads(head.ask("status", "--json").stdout)
    assert (state["job_id"], state["status"], state["exit_code"]) == (job_id, "stopped", 143)
    assert state["file"] == str(sweep_file)

    assert run_dir.parent == head.home / "tune_easytrain_runs"
    first, second = te.load_results(run_dir).records()
    assert first.state is TrialState.FINISHED
    assert not second.state.is_final
    gate.touch()
    results = te.resume(run_dir, quiet=True)
    assert list(results.frame()["state"]) == ["finished", "finished"]
    assert [[report["epoch"] for report in record.reports] for record in results.records()] == [[1, 2]] * 2


def test_exit_codes_are_the_jobs_and_a_broken_connection_is_made_again(head: Head, tmp_path: Path) -> None:
    script = tmp_path / "drive.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(head.port)],
        env=head.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + head.story()
    answer = json.loads(done.stdout)
    assert answer["codes"] == [2, 137, 0]
    assert answer["cuts"] == 2
    said = [line for line in answer["said"].splitlines() if line.startswith("line")]
    assert said == [f"line {i} end" for i in range(1, 21)]


def test_refusals_end_with_2(head: Head, sweep_file: Path) -> None:
    unknown = head.ask("stop", "nobody")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert f"there is no job nobody at {head.address}" in unknown.stderr
    refused = head.ask("submit", sweep_file, RAY_AUTH_TOKEN="b" * 40)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{head.address}: the cluster refuses: Authentication failed" in refused.stderr
    assert "RAY_AUTH_TOKEN" in refused.stderr
