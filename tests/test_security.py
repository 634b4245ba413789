"""What the package must not contain, and what strangers' files and trials must not do to who reads them.

Of the other tests of security, `test_ownership.py` has whose code is run, `test_credentials.py` secrets,
`test_plain_text.py` names, `test_cluster_files.py` clusters, `integration/test_security_on_ray.py` ports, and
`dashboard/test_server.py` who may look at the dashboard.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tune_easytrain.config import load_config
from tune_easytrain.errors import ConfigError
from tune_easytrain.events import Created, Failed, append_events
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_context import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("tune_easytrain", "examples") for path in (ROOT / folder).rglob("*.py"))

UNPICKLING = {
    "child_process.py": "what this process or its own child has pickled; it comes over a pipe",
    "device_session.py": "the task, from the owner of this process",
    "function_session.py": "the function, from the owner of this process",
    "model_check.py": "the task, which this process has just pickled",
    "ray_snapshot.py": "Ray's own file of a run directory, after `require_own`",
    "task_check.py": "the task, in a child of what was sent by the driver",
    "trial_estimates.py": "the task, from the owner of this process",
}
"""The modules that unpickle, and where the bytes come from."""

FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "tempfile.mktemp", "marshal.loads", "marshal.load",
    "shelve.open", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load",
    "yaml.full_load_all", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load", "torch.hub.load",
    "shutil.unpack_archive",
}  # fmt: skip
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "_pickle"}


def faults_of(tree: ast.AST, may_unpickle: bool) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield f"{node.value!r} listens on every address"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module, _, function = name.rpartition(".")
        if name in FORBIDDEN:
            yield name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if function in ("load", "loads", "Unpickler") and module in PICKLES and not may_unpickle:
            yield f"{name} in a module that is not on the list"
        if given.get("shell", "False") != "False":
            yield f"{name} with a shell"
        if given.get("allow_pickle", "False") != "False":
            yield f"{name} with allow_pickle"
        if given.get("debug") == "True" or function == "enable_dev_tools":
            yield f"{name} with a debugger that runs what a page sends"
        if any(keyword.startswith("dangerously_allow") for keyword in given if keyword):
            yield f"{name} with text that a browser obeys"
        if given.get("verify") == "False":
            yield f"{name} without looking at certificates"
        if (
            function in ("bind", "create_server")
            and node.args
            and ast.unparse(node.args[0]).startswith("('',")
        ):
            yield f"{name} listens on every address"
        if function == "extractall":
            yield f"{name} writes where the archive says"
        if name == "yaml.compose" and given.get("Loader") != "_CoreLoader":
            yield f"{name} with another loader"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_runs_or_believes_what_it_should_not(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert list(faults_of(tree, path.name in UNPICKLING)) == []


def test_modules_that_may_unpickle_do() -> None:
    for name in UNPICKLING:
        assert list(faults_of(ast.parse((ROOT / "tune_easytrain" / name).read_text()), False)), name


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')", "os.system('x')", "yaml.load(text, Loader=yaml.SafeLoader)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "pickle.loads(b)", "cloudpickle.load(f)",
        "pickle.Unpickler(f)", "subprocess.run('x', shell=True)", "np.load(path, allow_pickle=True)",
        "archive.extractall(folder)", "TCPStore('0.0.0.0', 0)", "listening.bind(('', 0))",
        "requests.get(url, verify=False)", "app.run(debug=True)", "app.enable_dev_tools()",
        "dcc.Markdown(text, dangerously_allow_html=True)",
        "yaml.compose(text, Loader=yaml.Loader)",
    ],
)  # fmt: skip
def test_the_search_finds(code: str) -> None:
    assert list(faults_of(ast.parse(code), False))


class Payload:
    """Runs code where it is unpickled: makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_brings_no_code(tmp_path: Path) -> None:
    proof, checkpoint = tmp_path / "proof", tmp_path / "checkpoint.pt"
    save_checkpoint({"model": {"weight": torch.ones(2)}, "extra": Payload(proof)}, checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(checkpoint)
    assert not proof.exists()
    torch.load(checkpoint, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize(
    "text",
    [
        "task: !!python/object/apply:pathlib.Path.touch [{proof}]",
        "config: {{x: !!python/object/new:pathlib.PosixPath [{proof}]}}",
        "config: !!python/name:os.system",
        "config: {{x: !<tag:yaml.org,2002:python/object/apply:os.system> 'touch {proof}'}}",
    ],
)
def test_a_sweep_file_brings_no_code(tmp_path: Path, text: str) -> None:
    proof, file = tmp_path / "proof", tmp_path / "sweep.yaml"
    file.write_text(text.format(proof=proof))
    with pytest.raises(ConfigError, match="is not allowed"):
        load_config(file)
    assert not proof.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a/b",
        ".",
        "..",
        "",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "x" * 300,
        "-rf",
        "$(id)",
        "a b",
        "a;b",
    ],
)
def test_a_sweep_cannot_be_named_like_that(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config({"name": name, "task": "m:f", "batch": {"effective_batch_size": 1}})
    assert "name: " in str(raised.value)
    assert not {"\0", "\x1b"} & set(str(raised.value))


HOSTILE = "\x1b[2J\x1b]0;owned\x07 [red]\r\x9b1A"
"""Clears the screen, sets the window's title, and goes back over what was written."""

SEEN = r"\x1b[2J\x1b]0;owned\x07 [red]\r\x9b1A"


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """A run directory in which all that a trial and a sweep file can say is hostile."""
    directory = RunDirectory.create(tmp_path, "run")
    directory.save_sweep(
        {
            "name": "run",
            "config": {},
            "grid_search": {"grid": {f"model.{HOSTILE}": [HOSTILE, "b"]}},
            **{name: {} for name in ("batch", "train", "memory", "trial")},
            "run": {"metric": HOSTILE, "mode": "min"},
        }
    )
    events = [Created(config={"model": {HOSTILE: HOSTILE}}), Failed(error=f"ValueError: {HOSTILE}")]
    append_events(directory.trial_path("trial_00000"), events)
    append_events(directory.trials_dir / f"{HOSTILE.replace('/', '')}.jsonl", events)
    return directory.path


def on_a_terminal(*arguments: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tune_easytrain", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "2000"},
    )  # fmt: skip
    os.close(theirs)
    told = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                told += os.read(ours, 65536)
            except OSError:  # the other end is closed, and all is read
                break
    process.wait()
    os.close(ours)
    return told.decode()


def test_results_do_nothing_to_the_terminal(hostile_run: Path) -> None:
    told = on_a_terminal("results", str(hostile_run))
    for sequence in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b"):
        assert sequence not in told
    assert told.count(SEEN) >= 7  # keys, values, metric, error and id, in heading and rows


def test_results_as_json_are_plain_text_that_gives_back_what_was_there(hostile_run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tune_easytrain", "results", str(hostile_run), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"\x1b", "\x07", "\x9b"} & set(done.stdout)
    assert json.loads(done.stdout)[-1]["error"] == f"ValueError: {HOSTILE}"


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_faults_and_plans_do_nothing_to_the_terminal(tmp_path: Path, command: str) -> None:
    file = tmp_path / "sweep.yaml"
    grid = {f"model.{HOSTILE}": [HOSTILE, "[bold]b"]}
    sweep = {"task": "none.py:f", "batch": {"effective_batch_size": 4}, "grid_search": {"grid": grid}}
    if command == "validate":
        sweep |= {HOSTILE: 1, "name": HOSTILE}
    file.write_text(json.dumps(sweep))  # which YAML reads, its escapes too
    told = on_a_terminal(command, str(file))
    for sequence in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b"):
        assert sequence not in told
    assert "]0;owned" in told
    assert "[red]" in told
