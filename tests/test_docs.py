"""The documentation holds: commands and snippets run, tables are the code's, links lead somewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tomllib
import typing
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import pandas as pd
import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from test_memory_plan import make_plan, make_sweep

import tune_easytrain as te
from tune_easytrain import cli, condition, events, probe, sections
from tune_easytrain.accelerators import ACCELERATORS
from tune_easytrain.config import SweepConfig
from tune_easytrain.grid import GridSearchConfig
from tune_easytrain.logger_config import LoggerConfig
from tune_easytrain.results import (
    COLUMNS,
    COMPARISON_COLUMNS,
    HISTORY_COLUMNS,
    Column,
    build_frame,
    summary_rows,
)
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.sweep_metrics import METRICS, PREFIX
from tune_easytrain.yaml_source import read_text

ROOT = Path(__file__).parents[1]
DOCS = [
    "README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
    "CONTRIBUTING.md",
]
PAGES = [*DOCS, "CHANGELOG.md"]
OPTIONAL_PACKAGES = {
    "docs/accumulation.md": ("lightning_fabric", "accelerate"),
    "docs/iqa.md": ("skimage", "sklearn"),
    "docs/language-models.md": ("transformers", "peft"),
    "docs/loggers.md": ("tensorboard",),
    "docs/dashboard.md": ("dash",),
    "docs/recommend.md": ("transformers", "peft"),
    "docs/report.md": ("plotly", "scipy"),
    "docs/true-batches.md": ("transformers", "peft", "skimage", "sklearn"),
    "docs/workload-knobs.md": ("skimage", "sklearn"),
    "docs/corrections.md": ("transformers", "peft"),
    "docs/comparison.md": ("accelerate", "optuna"),
}
RUN_DIR = re.compile(r"\S*\bruns/(\w+)_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
Check = Callable[[str], None]
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}


# What cannot run in a test, why, and what is checked of it instead.


def check_make(command: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check_pip(command: str) -> None:
    assert (ROOT / "pyproject.toml").is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r"\[([\w,]+)]", command)
    assert named is None or set(named[1].split(",")) <= extras.keys()


def check_ray(command: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import cli as ray_cli

    _, name, *arguments = shlex.split(command)
    ray_cli.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]
    paths = [word for word in arguments if word.startswith(("cluster/", "examples/"))]
    for path in paths:
        assert (ROOT / path).is_file()
    cluster = read_text((ROOT / paths[0]).read_text(), paths[0])[0].data
    validate_config(prepare_config(cluster))


def check_plan_instead(command: str) -> None:
    """The same file and options, planned and not run."""
    arguments = shlex.split(command)[2:]
    trials = json.loads(call(["plan", *arguments, "--json"]).out)
    assert len(trials) == 9
    assert trials[0]["config"]["data"]["root"] == "/data/UCF-101"


def check_options(command: str) -> None:
    """The command line takes it, and the files it names are there."""
    _, name, *arguments = shlex.split(command)
    context = typer.main.get_command(cli.app).commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]
    for file in ("file", "cluster"):
        assert (ROOT / (context.params.get(file) or ".")).exists()


def check_example(command: str) -> None:
    """The variable reaches the sweep, which is the one of the file."""
    setting, _, script = shlex.split(command)
    name, _, folder = setting.partition("=")
    example = load_module(ROOT / script)
    with mock.patch.dict(os.environ, {name: folder}):
        overrides = example.choose_overrides(example.parse_arguments([]))
    sweep = te.load_config(example.DEFAULT_SWEEP, overrides=overrides)
    assert sweep == te.load_config(
        ROOT / "configs/ucf101_video_grid.yaml", overrides=[f"config.data.root={folder}"]
    )


def check_pytest(command: str) -> None:
    for path in re.findall(r"\btests/\S+", command):
        assert list((ROOT / path).rglob("test_*.py")) or (ROOT / path).is_file(), path


def check_kubectl(command: str) -> None:
    """The files are there, and the name is the job's."""
    for path in re.findall(r"\b(?:cluster|examples)/\S+", command):
        assert (ROOT / path).is_file(), path
    job = read_text((ROOT / "cluster/kuberay.yaml").read_text(), "kuberay.yaml")[0].data
    assert not command.endswith("ucf101") or job["metadata"]["name"] == "ucf101"


def no_check(command: str) -> None:
    pass


NOT_RUN: dict[str, tuple[str, Check]] = {
    "make demo": ("installs everything and trains nine models for minutes", check_make),
    "make test": ("this is it", check_make),
    "make lint": ("installs; .ci/run does it", check_make),
    "make docs": ("installs; .ci/run does it", check_make),
    "pip install --editable .": ("installs", check_pip),
    "pip install --editable '.[video,dashboard,report]'": ("installs", check_pip),
    "pip install --editable '.[torchcodec]'": ("installs", check_pip),
    "pip install --editable '.[iqa]'": ("installs", check_pip),
    "pip install 'tune-easytrain[lm]'": ("installs", check_pip),
    "tune-easytrain run configs/iqa_batch_study.yaml --set config.data.root=/data/koniq10k --quick": (
        "needs KonIQ-10k and a GPU",
        check_options,
    ),
    "tune-easytrain run configs/iqa_batch_study.yaml --set config.data.root=/data/koniq10k": (
        "needs KonIQ-10k and a GPU",
        check_options,
    ),
    ".venv/bin/pip install --editable '.[dev]'": ("installs", check_pip),
    "python3 -m venv .venv": ("would make an environment in the repository", no_check),
    "source .venv/bin/activate": ("is for a person's shell", no_check),
    "tune-easytrain run configs/ucf101_video_grid.yaml --set config.data.root=/data/UCF-101": (
        "needs the 7 GB of UCF101 and GPUs",
        check_plan_instead,
    ),
    "UCF101_ROOT=/data/UCF-101 python examples/ucf101.py": (
        "needs the 7 GB of UCF101 and GPUs",
        check_example,
    ),
    "pip install 'tune-easytrain[cluster]'": ("installs", check_pip),
    "ray dashboard cluster/gpu.yaml": ("needs those machines", check_ray),
    "tune-easytrain submit configs/ucf101_video_grid.yaml --address http://127.0.0.1:8265": (
        "needs those machines",
        check_options,
    ),
    "tune-easytrain status --address http://127.0.0.1:8265": ("needs those machines", check_options),
    "tune-easytrain logs ucf101_video_grid-1a2b3c4d --follow --address http://127.0.0.1:8265": (
        "needs those machines",
        check_options,
    ),
    "tune-easytrain stop ucf101_video_grid-1a2b3c4d --address http://127.0.0.1:8265": (
        "needs those machines",
        check_options,
    ),
    "tune-easytrain submit configs/ucf101_video_grid.yaml "
    "--resume /shared/runs/ucf101_video_grid_2026-11-22_10-00-00 --address http://127.0.0.1:8265": (
        "needs those machines",
        check_options,
    ),
    "tune-easytrain results --cluster cluster/gpu.yaml --csv results.csv": (
        "needs those machines",
        check_options,
    ),
    "tune-easytrain results /shared/runs/ucf101_video_grid_2026-11-22_10-00-00 --cluster cluster/gpu.yaml": (
        "needs those machines",
        check_options,
    ),
    "tensorboard --logdir runs": ("serves until it is ended; test_tensorboard_log.py asks it", no_check),
    "ray up cluster/gpu.yaml": ("starts machines on AWS", check_ray),
    "ray submit cluster/gpu.yaml examples/ucf101.py": ("needs those machines", check_ray),
    "ray down cluster/gpu.yaml": ("ends those machines", check_ray),
    "ray submit cluster/gpu.yaml examples/ucf101.py -- --max-experiments 2 --set train.epochs=5": (
        "needs those machines",
        check_ray,
    ),
    "tune-easytrain results --cluster cluster/gpu.yaml": ("needs those machines", check_options),
    "tune-easytrain dashboard --cluster cluster/gpu.yaml": ("needs those machines", check_options),
    "tune-easytrain dashboard --cluster cluster/gpu.yaml "
    "/shared/runs/ucf101_video_grid_2026-11-22_10-00-00": ("needs those machines", check_options),
    "ssh -L 8300:127.0.0.1:8300 HOST": ("needs another machine", no_check),
    "pip install 'tune-easytrain[dashboard]'": ("installs", check_pip),
    "pip install 'tune-easytrain[report]'": ("installs", check_pip),
    "ray submit --start --stop cluster/gpu.yaml examples/ucf101.py": ("starts machines on AWS", check_ray),
    "ray submit --start --stop --tmux cluster/gpu.yaml examples/ucf101.py": (
        "starts machines on AWS",
        check_ray,
    ),
    "ray up cluster/onprem.yaml": ("needs hosts; test_ray_submit.py has them", check_ray),
    "ray submit cluster/onprem.yaml examples/ucf101.py": ("needs those hosts", check_ray),
    "ray down cluster/onprem.yaml": ("needs those hosts", check_ray),
    "ray rsync-down cluster/gpu.yaml '~/tune_easytrain/cluster/auth_token' ~/.ray_cluster_token": (
        "needs those machines",
        check_ray,
    ),
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray_cluster_token": (
        "is for a person's shell",
        no_check,
    ),
    "pip install --editable '.[video,cluster]' boto3": ("installs", check_pip),
    "kubectl create configmap tune-easytrain --from-file=cluster/settings.sh "
    "--from-file=cluster/setup_node.sh --from-file=examples/ucf101.py --from-file=dist": (
        "needs Kubernetes",
        check_kubectl,
    ),
    "kubectl create -f cluster/kuberay.yaml": ("needs Kubernetes", check_kubectl),
    "kubectl logs --follow --selector=job-name=ucf101": ("needs Kubernetes", check_kubectl),
    "kubectl delete rayjob ucf101": ("needs Kubernetes", check_kubectl),
    "python -m pytest --ignore=tests/integration --ignore=tests/examples --ignore=tests/gpu": (
        "the suite in the suite",
        check_pytest,
    ),
    "python -m pytest tests/integration": ("the suite in the suite", check_pytest),
    "python -m pytest tests/examples": ("the suite in the suite", check_pytest),
    "python -m pytest tests/gpu": ("needs a GPU", check_pytest),
    "python -m pytest tests/test_docs.py": ("this is it", check_pytest),
    "python -m pytest tests/test_probe.py -k grow": ("the suite in the suite", check_pytest),
    "pip wheel --no-deps --wheel-dir dist .": ("needs the build back end from PyPI", check_pip),
    "git tag v0.1.0": ("changes the repository", no_check),
}


def check_demo_table(text: str) -> None:
    """The table that `make demo` printed is one of its sweep as it stands, E reached exactly."""
    heading, _, *lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    rows = [dict(zip(heading, line, strict=True)) for line in lines if line[0].startswith("trial_")]
    config = te.load_config(ROOT / "configs/ucf101_demo.yaml")
    trials = te.expand_trials(config)
    empty = build_frame([], "val_accuracy", "max", ["model.type", "hp.batch_size"])
    assert heading == summary_rows(empty, "val_accuracy", ["model.type", "hp.batch_size"])[0]
    assert [row["model.type"] for row in rows] == [trial["model"]["type"] for trial in trials]
    assert [int(row["hp.batch_size"]) for row in rows] == [trial["hp"]["batch_size"] for trial in trials]
    budget = probe.format_bytes(config.batch.memory_budget or 0)
    for row in rows:
        plan = te.BatchPlan.build(int(row["E"]), int(row["m"]))
        assert plan.effective_batch_size == config.batch.effective_batch_size
        assert plan.accumulation_steps == int(row["k"])
        assert row["peak / budget"].endswith(f"/ {budget}")
        assert row["state"] == "finished"


def check_run_directory(text: str) -> None:
    run = documented_run("first")
    names = re.findall(r"^\W*([\w./]*\w\.\w+|\w+/)(?=\s|$)", "\n".join(text.splitlines()[1:]), re.MULTILINE)
    directory = RunDirectory(run)
    known = [directory.train_function_path.name]
    assert len(names) >= 6
    for name in names:
        assert name in known or list(run.rglob(name.rstrip("/"))), f"{name} is not in {run}"


def check_modules(text: str) -> None:
    for name in set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b|\bcli\b|\bsweep\b|\btrial\b", text)):
        assert list((ROOT / "tune_easytrain").rglob(f"{name}.py")), name


def check_scrape_config(text: str) -> None:
    """It is YAML that names the file which the tests' own Prometheus is told of."""
    (job,) = read_text(text, "prometheus.yml")[0].data["scrape_configs"]
    (place,) = job["file_sd_configs"]
    assert [Path(file).name for file in place["files"]] == ["prom_metrics_service_discovery.json"]


TEXT_BLOCKS: dict[tuple[str, str], tuple[str, Check]] = {
    ("README.md", "trial "): ("what `make demo` printed", check_demo_table),
    ("docs/results.md", "runs/first_"): ("the run directory", check_run_directory),
    ("CONTRIBUTING.md", "cli "): ("modules in their order", check_modules),
    ("docs/loggers.md", "scrape_configs:"): ("what a Prometheus is told", check_scrape_config),
    ("docs/tasks.md", "libs="): ("run by test_torchcodec_decoder.py, in a home of its own", no_check),
}
"""Blocks that are no code, by document and beginning: what each is, and what holds it to the truth."""


# Running the blocks


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, and the exit code its commands must have."""

    doc: str
    line: int
    language: str
    text: str
    exit_code: int

    @property
    def file_name(self) -> str | None:
        """The file it is written to: named in a comment on its first line."""
        match = re.match(r"# ([\w./-]+\.(?:py|yaml))$", self.text.splitlines()[0])
        return match[1] if match else None


def read_blocks(doc: str) -> list[Block]:
    blocks: list[Block] = []
    exit_code, start, language, lines = 0, 0, "", list[str]()
    for number, line in enumerate((ROOT / doc).read_text().splitlines(), start=1):
        if line.startswith("```") and not start:
            start, language, lines = number, line[3:], []
        elif line.startswith("```"):
            blocks.append(Block(doc, start, language, "\n".join(lines), exit_code))
            start = exit_code = 0
        elif start:
            lines.append(line)
        elif match := re.match(r"<!-- exit code (\d+) -->", line):
            exit_code = int(match[1])
    assert not start, f"{doc}: a block is not closed"
    return blocks


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def call(arguments: Sequence[str]) -> Answer:
    """Call `tune-easytrain` in this process, so that all sweeps share one Ray."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["tune-easytrain", *arguments])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def documented_run(name: str) -> Path:
    """The first run of that name: the one that the documented command made."""
    runs = sorted(Path("runs").glob(f"{name}_*"), key=lambda path: path.name)
    assert runs, f"no sweep named {name} has been run before this"
    return runs[0]


def with_real_runs(text: str) -> str:
    """The text with the run directories of this test."""
    return RUN_DIR.sub(
        lambda match: match[0][: match[0].index("runs/")] + str(documented_run(match[1])), text
    )


def run_command(command: str, exit_code: int) -> str:
    if command in NOT_RUN:
        NOT_RUN[command][1](command)
        return ""
    program, *arguments = shlex.split(with_real_runs(command))
    if program in PROGRAMS:
        done = subprocess.run([*PROGRAMS[program], *arguments], capture_output=True, text=True)
        assert done.returncode == exit_code, f"{command}: exit code {done.returncode}\n{done.stderr}"
        return done.stderr + done.stdout
    if arguments[0] == "dashboard":
        return look_at_dashboard(arguments)
    if arguments[0] == "run" and "--debug" not in arguments:
        arguments += ["--set", "run.max_concurrent=1"]  # the start of one actor less
    assert program == "tune-easytrain", f"neither run here nor listed in NOT_RUN: {command}"
    answer = call(arguments)
    assert answer.code == exit_code, f"{command}: exit code {answer.code}\n{answer.err}{answer.out}"
    return answer.err + answer.out


def look_at_dashboard(arguments: Sequence[str]) -> str:
    """Start it, fetch its page by the address that it prints, and end it with Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-m", "tune_easytrain", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.readline()
        url = printed.removeprefix("Dashboard: ").replace(socket.gethostname(), "127.0.0.1")
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(url.strip(), timeout=60) as page:
            assert "<title>tune_easytrain</title>" in page.read().decode()
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    return printed


def run_console(block: Block) -> None:
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        printed = run_command(command, block.exit_code)
        if command not in NOT_RUN:
            assert_shown(shown, printed, command)


def assert_shown(shown: str, printed: str, command: str) -> None:
    """Compare output line by line; the line `…` stands for any lines, measured numbers are not compared."""
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else re.escape(line) + r"\n" for line in comparable(shown))
    text = "".join(f"{line}\n" for line in comparable(printed))
    assert re.fullmatch(pattern, text), f"{command}\nis said to print\n{shown}\nand prints\n{printed}"


def comparable(text: str) -> list[str]:
    text = re.sub(r"─+", "─", RUN_DIR.sub("RUN", text))
    text = re.sub(r"\b\d+(?:\.\d+)?(?: ?(?:[KMGT]iB|B|s)\b)", "#", text)
    text = re.sub(r"\b\d+\.\d+(?:e[+-]\d+)?\b|\b\d{4,}\b", "#", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def run_python(block: Block) -> None:
    text = with_real_runs(block.text)
    code = compile("\n" * block.line + text, str(ROOT / block.doc), "exec")
    modules, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, {"__name__": "__documentation__"})
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(os.getcwd()):
                del sys.modules[name]


def run_yaml(block: Block) -> None:
    """Load a fragment as the part of a sweep file that it is."""
    source, faults = read_text(block.text, f"{block.doc}:{block.line}")
    assert not faults
    te.load_config({"batch": {"effective_batch_size": 8}, **source.data})


def run_text(block: Block) -> None:
    for (doc, beginning), (_, check) in TEXT_BLOCKS.items():
        if block.doc == doc and block.text.startswith(beginning):
            return check(block.text)
    return pytest.fail("neither code nor listed in TEXT_BLOCKS")


def run_sh(block: Block) -> None:
    for command in block.text.splitlines():
        run_command(command, block.exit_code)


RUNNERS = {"python": run_python, "yaml": run_yaml, "sh": run_sh, "console": run_console, "text": run_text}


class Workspace:
    """A folder like a clone of the repository, in which each document is run once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: set[str] = set()
        for name in ("benchmarks", "configs", "examples", "cluster", "pyproject.toml"):
            (path / name).symlink_to(ROOT / name)

    def run(self, doc: str) -> None:
        if doc in self._done:
            return
        self._done.add(doc)
        blocks, failures = read_blocks(doc), list[str]()
        with contextlib.chdir(self._path):
            for number, block in enumerate(blocks):
                try:
                    self._run_block(block, blocks[number + 1 :])
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 -- told below
                    failures.append(f"{doc}:{block.line}: {type(error).__name__}: {error}")
        assert not failures, "\n\n".join(failures)

    def _run_block(self, block: Block, later: Sequence[Block]) -> None:
        assert block.language in RUNNERS, f"a block tagged {block.language!r}"
        if block.file_name is not None:
            Path(block.file_name).write_text(block.text + "\n")
            stem = Path(block.file_name).stem
            used = (block.file_name, f"import {stem}", f"from {stem} import")
            assert any(name in other.text for other in later for name in used), (
                f"{block.file_name} is not used"
            )
        else:
            RUNNERS[block.language](block)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    from tune_easytrain.cluster import ray_session

    with ray_session("local"):
        yield Workspace(tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("doc", DOCS)
def test_every_block_runs(doc: str, workspace: Workspace) -> None:
    for package in OPTIONAL_PACKAGES.get(doc, ()):
        pytest.importorskip(package)
    workspace.run("README.md")  # whose sweep the other pages look at
    workspace.run(doc)


def test_every_command_listed_as_not_run_is_documented() -> None:
    lines = {
        line.removeprefix("$ ") for doc in DOCS for b in read_blocks(doc) for line in b.text.splitlines()
    }
    assert NOT_RUN.keys() - lines == set()


# Tables


def table_below(doc: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head, as cells."""
    text = (ROOT / doc).read_text()
    assert heading in text, f"{doc} has no {heading!r}"
    lines = text[text.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
    return rows


def code(cell: str) -> str:
    match = re.match(r"`([^`]+)`", cell)
    return match[1] if match else cell


def shown_default(field: typing.Any) -> object:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, sections.Section):
        return "a section"
    return "not set" if default is None else default


def literals(annotation: object) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [name for part in typing.get_args(annotation) for name in literals(part)]


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("### Top level\n", SweepConfig),
        ("### `grid_search`\n", GridSearchConfig),
        ("### `batch`\n", sections.BatchConfig),
        ("### `train`\n", sections.TrainConfig),
        ("### `memory`\n", sections.MemoryConfig),
        ("### `trial`\n", sections.TrialConfig),
        ("### `trial.resources`\n", sections.ResourcesConfig),
        ("### `run`\n", sections.RunConfig),
        ("### `run.scheduler`\n", sections.SchedulerConfig),
        ("### `run.loggers`\n", LoggerConfig),
    ],
)
def test_the_keys_and_defaults_of_the_sweep_file_are_the_codes(heading: str, model: type[BaseModel]) -> None:
    rows = table_below("docs/sweep-file.md", heading)
    assert [code(key) for key, *_ in rows] == list(model.model_fields)
    for key, default, meaning in rows:
        field = model.model_fields[code(key)]
        told = read_text(code(default), "")[0].data if "`" in default else default
        assert told == shown_default(field), key
        for name in literals(field.annotation):
            assert f"`{name}`" in meaning, f"{key} may be {name}"


def test_the_metrics_are_the_codes() -> None:
    rows = table_below("docs/loggers.md", "Every metric has the label")
    assert rows == [
        [f"`ray_{PREFIX}{row.name}`", row.kind, ", ".join(f"`{label}`" for label in row.labels), row.meaning]
        for row in METRICS
    ]


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("### Fixed columns", COLUMNS),
        ("### History columns", HISTORY_COLUMNS),
        ("### Comparison columns", COMPARISON_COLUMNS),
    ],
)
def test_the_columns_are_the_codes(heading: str, columns: Sequence[Column]) -> None:
    documented = [[code(name), *rest] for name, *rest in table_below("docs/results.md", heading)]
    assert documented == [[c.name, c.dtype, c.unit or "–", c.meaning] for c in columns]


def test_the_operators_of_conditions_are_the_codes() -> None:
    _, operators, _ = table_below("docs/results.md", "A condition is one comparison")
    assert re.findall(r"`([^`]+)`", operators[1]) == [*condition._OPERATORS]


def test_the_events_are_the_codes() -> None:
    rows = {
        code(name): cells for name, _, cells in table_below("docs/results.md", "## The events of a trial")
    }
    assert rows.keys() == events._KINDS.keys()
    for kind, cells in rows.items():
        fields = {field.name for field in dataclasses.fields(events._KINDS[kind])} - {"time"}
        assert set(re.findall(r"`(\w+)`", cells)) == fields, kind


def test_the_fields_of_a_task_are_the_codes() -> None:
    rows = {code(name): needed for name, needed, _ in table_below("docs/tasks.md", "## The fields of a Task")}
    fields = dataclasses.fields(te.Task)
    assert list(rows) == [field.name for field in fields]
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    assert {name for name, needed in rows.items() if needed == "yes"} == required


@pytest.mark.parametrize(
    ("heading", "names"),
    [("**The outcome of an attempt**", probe.Outcome), ("**What bounded the result**", probe.Bound)],
)
def test_the_outcomes_of_the_probe_are_the_codes(heading: str, names: type) -> None:
    assert [code(name) for name, _ in table_below("docs/tasks.md", heading)] == list(names)


def test_the_trial_of_a_training_function_has_what_is_said() -> None:
    text = (ROOT / "docs/tasks.md").read_text()
    names = [code(name).partition("(")[0] for name, _ in table_below("docs/tasks.md", "What `trial` has:")]
    assert "load_checkpoint" in names
    for name in names:
        assert name in te.TrialContext.__dataclass_fields__ or hasattr(te.TrialContext, name), name
    assert all(size in text for size in ("5 tries", "10 %", "1.5 times", "first eight", "(2 samples)"))
    assert (probe.MAX_ATTEMPTS, probe.SMALLEST_GAIN) == (5, 0.10)


@pytest.mark.parametrize("document", ["docs/reliability.md", "docs/security.md"])
def test_the_tests_that_are_to_show_it_are_there(document: str) -> None:
    rows = table_below(document, document_title(document))
    assert len(rows) > 5
    for *_, tests in rows:
        for name in re.findall(r"`([^`]+)`", tests):
            places = [ROOT / "tests/integration/faults" / name, ROOT / name, ROOT / "tests" / name]
            assert any(place.is_file() for place in places), name


def test_the_soak_is_what_was_measured() -> None:
    figures = json.loads((ROOT / "benchmarks/soak_2_cores.json").read_text())
    killed = figures["killed"]
    samples = [sample for sample in figures["driver"] if sample["ended"]]
    first, last = (round(samples[which]["memory_mib"]) for which in (0, -1))
    assert figures["faults"] == []
    assert figures["states"] == {"finished": 1000}
    assert [value for _, value in table_below("docs/reliability.md", "## Soak")] == [
        "1,000, all finished once, with the same losses",
        f"{killed['child']} children, {killed['worker']} Ray workers, {killed['node']} nodes",
        f"{figures['num_failures']}, of one trial {figures['most_failures_of_a_trial']} at most",
        f"{figures['minutes']:g}",
        f"{first} to {last} MiB",
        f"{figures['kib_per_trial']:.0f} KiB",
        f"{figures['bare_ray_tune']['kib_per_trial']:.0f} KiB",
        f"{max(sample['open_files'] for sample in samples):g} at most",
    ]


def document_title(document: str) -> str:
    return (ROOT / document).read_text().splitlines()[0]


def test_the_gpus_are_the_codes() -> None:
    rows = table_below("docs/memory.md", "## The GPUs")
    assert rows == [[gpu.name, f"{gpu.total_bytes / 2**30:.1f} GiB"] for gpu in ACCELERATORS]


def test_the_table_of_finders_is_what_was_measured() -> None:
    lines = (ROOT / "benchmarks/find_microbatch_h100.jsonl").read_text().splitlines()
    cases = {(row["precision"], row["model"], row["method"]): row for row in map(json.loads, lines)}
    others = ("lightning_binsearch", "lightning_power", "accelerate")
    rows = table_below("docs/memory.md", "## Against other finders")
    assert {(precision, model) for model, precision, *_ in rows} == {case[:2] for case in cases}
    for model, precision, *cells in rows:
        ours, truth, *finders = (cases.get((precision, model, name)) for name in ("ours", "truth", *others))
        assert ours is not None
        assert truth is not None
        found = [ours["microbatch_size"], truth["microbatch_size"], f"{ours['gpu_seconds']:.1f}"]
        told = [f"{row['microbatch_size']} in {row['gpu_seconds']:.0f} s" if row else "–" for row in finders]
        assert cells == [*map(str, found), *told], (model, precision)


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def test_the_tables_of_strategies_are_what_was_measured() -> None:
    lines = (ROOT / "benchmarks/strategies_h100.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    speed, memory = (
        {
            (row["model"], row["precision"], row["channels_last"], row["checkpointing"]): row
            for row in rows
            if row["part"] == part
        }
        for part in ("speed", "checkpointing")
    )
    formats = (("fp32", False), ("bf16", False), ("bf16", True))
    for model, *cells in table_below("docs/memory.md", "the most samples that fit at once:"):
        found = [speed[model, *form, "none"] for form in formats]
        assert cells == [f"{rate(row['samples_per_second'])} ({row['largest']})" for row in found], model
    for model, *cells in table_below("docs/memory.md", "Checkpointing in fp32"):
        found = [memory[model, "fp32", False, share] for share in ("none", 0.5, "blocks")]
        assert cells == [
            f"{row['peak_bytes'] / 2**30:.2f} GiB, {rate(row['samples_per_second'])}" for row in found
        ], model
    plain, compiled = (rate(row["samples_per_second"]) for row in rows if row["part"] == "compile")
    text = (ROOT / "docs/memory.md").read_text()
    assert f"makes {compiled} samples per second instead of {plain}, with 64 at once" in text
    ratios = [row["estimated_peak_bytes"] / row["peak_bytes"] for row in rows if row["part"] != "compile"]
    assert (round(min(ratios), 2), round(max(ratios), 2)) == (0.99, 1.04)


def test_the_table_of_sharing_is_what_was_measured() -> None:
    lines = (ROOT / "benchmarks/packing_h100.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all((row["states"], row["errors"], row["num_rescues"]) == ({"finished": 8}, [], 0) for row in rows)
    assert all(row["microbatch_sizes"] == [16] for row in rows)
    measured = {(str(row["loader_workers"]), row["gpu"]): row for row in rows}
    assert {share for row in rows if row["gpu"] == "auto" for share in row["gpu_shares"]} == {0.1, 0.15}
    table = table_below("docs/memory.md", "### What sharing gains")
    assert {(loaders, gpu) for loaders, *_ in table for gpu in ("auto", 1)} == measured.keys()
    for loaders, *cells in table:
        shared, alone = measured[loaders, "auto"], measured[loaders, 1]
        ratio = alone["seconds"] / shared["seconds"]
        times = [row["median_training_s"] for row in (shared, alone)]
        assert cells == [str(shared["seconds"]), str(alone["seconds"]), f"{ratio:.1f}", *map(str, times)]


def test_the_costs_of_a_trial_are_what_was_measured() -> None:
    overhead = json.loads((ROOT / "benchmarks/trial_overhead_2_cores.json").read_text())["rows"]
    assert table_below("docs/scaling.md", "## One trial") == [
        [
            row["trial"],
            f"{row['first_seconds']:.2f}",
            f"{row['seconds_per_trial']:.4f}",
            f"{row['all_seconds']:.2f}",
        ]
        for row in overhead
    ]
    scale = json.loads((ROOT / "benchmarks/scale_2_cores.json").read_text())
    per_trial, simulated = scale["sweep"]["per_trial"], scale["simulated"]
    assert table_below("docs/scaling.md", "## Driver and head") == [
        [name, f"{per_trial[f'{name}_kib']:.2f}", f"{per_trial[f'{name}_cpu_ms']:.2f}"]
        for name in ("driver", "gcs_server", "raylet")
    ]
    text = (ROOT / "docs/scaling.md").read_text()
    assert f"The storage holds {per_trial['storage_kib']} KiB per trial" in text
    rows = table_below("docs/scaling.md", "## Ten thousand trials on a thousand GPUs")
    seconds = [f"{simulated[f'{step}_s']} s" for step in ("load", "create", "frame")]
    events = f"{simulated['events_per_second']} events per second"
    assert [cell for _, cell in rows] == [*seconds[:2], events, seconds[2]]
    assert (simulated["num_trials"], simulated["num_events"]) == (10000, 140000)


def test_the_keys_of_a_planned_trial_are_the_codes() -> None:
    (trial,) = make_plan(make_sweep(["small"])).trials
    assert [code(key) for key, _ in table_below("docs/memory.md", "## For scripts")] == list(trial.as_json())


def test_the_tables_of_the_memory_engine_are_what_was_measured() -> None:
    page = "docs/memory-engine.md"
    lines = (ROOT / "benchmarks/estimate_accuracy_h100.jsonl").read_text().splitlines()
    (peaks,) = (
        {int(size): phases for size, phases in row["peaks"].items()}
        for row in map(json.loads, lines)
        if (row["model"], row["precision"]) == ("vit_b_16", "fp32")
    )
    peak = {size: max(phases.values()) for size, phases in peaks.items()}
    straight_on = [peak[2] + (peak[4] - peak[2]) / 2 * (size - 2) for size in peak]
    found = {phase: [phases[phase] for phases in peaks.values()] for phase in peaks[2]}
    found |= {"peak": [*peak.values()], "straight on from 2 and 4": straight_on}
    assert table_below(page, "(vit_b_16, fp32), in GiB") == [
        [name, *(f"{num_bytes / 2**30:.2f}" for num_bytes in row)] for name, row in found.items()
    ]

    lines = (ROOT / "benchmarks/find_microbatch_h100.jsonl").read_text().splitlines()
    rows = {(row["model"], row["precision"], row["method"]): row for row in map(json.loads, lines)}
    assert table_below(page, "## Confirm once") == [
        [
            model,
            precision,
            str(row["microbatch_size"]),
            str(row["tries"]),
            f"{row['estimated_peak_bytes'] / row['peak_bytes']:.3f}",
            f"{row['estimate_seconds']:.1f}",
            f"{row['gpu_seconds']:.1f}",
        ]
        for model, precision, row in (
            (model, precision, rows[model, precision, "ours"])
            for model, precision, *_ in table_below(page, "## Confirm once")
        )
    ]
    assert len(table_below(page, "## Confirm once")) == sum(method == "ours" for *_, method in rows)
    for model, precision, *cells in table_below(page, "## What fits is not what is used"):
        speed = rows[model, precision, "throughput"]["samples_per_second"]
        largest = max(speed, key=int)
        told = [f"{speed[size]:.0f}" for size in ("8", "16", "32")]
        assert cells == [*told, f"{speed[largest]:.0f} at {largest}"], (model, precision)
    fastest = rows["mvit_v1_b", "bf16", "throughput"]["samples_per_second"]["57"]
    text = " ".join((ROOT / page).read_text().split())
    assert f"mvit_v1_b in bf16 makes {fastest:.0f} samples per second with 57 at once" in text


def test_the_messages_of_the_page_on_memory_are_the_packages() -> None:
    rows = table_below("docs/how-to/out-of-memory.md", "Look up the message")
    package = "\n".join(path.read_text() for path in (ROOT / "tune_easytrain").glob("*.py"))
    text = re.sub(r'"\s*\n\s*f?"', "", package)  # literals in several parts
    assert len(rows) > 5
    for message, *_ in rows:
        assert code(message) in text, message


def test_the_table_of_the_comparison_is_what_was_measured() -> None:
    lines = (ROOT / "benchmarks/find_microbatch_h100.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    most = {
        (row["model"], row["precision"]): row["microbatch_size"] for row in rows if row["method"] == "truth"
    }
    methods = ("ours", "lightning_binsearch", "lightning_power", "accelerate")
    found = []
    for method in methods:
        cases = [row for row in rows if row["method"] == method]
        seconds, tries = ([row[key] for row in cases] for key in ("gpu_seconds", "tries"))
        shares = [row["microbatch_size"] / most[row["model"], row["precision"]] for row in cases]
        found.append(
            [
                str(len(cases)),
                f"{statistics.median(seconds):.1f} ({max(seconds):.0f})",
                f"{statistics.median(tries):g} ({max(tries)})",
                f"{statistics.median(shares):.0%} ({min(shares):.0%})".replace("%", " %"),
            ]
        )
    assert [cells for _, *cells in table_below("docs/comparison.md", "## Finders, measured")] == found


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_a_page_of_every_document(site: Path) -> None:
    pages = [Path(doc).relative_to("docs") for doc in DOCS if doc.startswith("docs/")]
    assert [page for page in pages if not (site / page.with_suffix(".html")).is_file()] == []


def test_the_site_asks_nobody_but_itself(site: Path) -> None:
    """No script, style, font or picture is fetched from another host."""
    fetched = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(https?:|//)[^"' >]*""")
    for page in site.rglob("*.html"):
        assert [match[0] for match in fetched.finditer(page.read_text())] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:|//)|@import", style.read_text()), style


def test_the_site_is_read_and_searched_from_disk_in_light_and_dark(site: Path) -> None:
    pytest.importorskip("playwright")
    from chromium import NoChromiumError, find_chromium, running_chromium
    from playwright.sync_api import expect

    try:
        program = find_chromium()
    except NoChromiumError as error:
        pytest.skip(str(error))
    faults: list[str] = []
    with running_chromium(program) as browser:
        for colors, scheme in (("light", "default"), ("dark", "slate")):
            page = browser.new_context(color_scheme=colors, offline=True).new_page()  # type: ignore[arg-type]
            page.on("requestfailed", lambda request: faults.append(request.url))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto((site / "how-to/own-loop.html").as_uri())
            expect(page.locator("body")).to_have_attribute("data-md-color-scheme", scheme)
            found = page.locator(".md-search-result__link").first
            for _ in range(20):  # what is typed before the page's script listens is lost
                page.locator("[data-md-component=search-query]").fill("")
                page.locator("[data-md-component=search-query]").press_sequentially("rescue")
                with contextlib.suppress(AssertionError):
                    expect(found).to_be_visible(timeout=2000)
                    break
            expect(found).to_be_visible()
    assert faults == []


def test_the_reference_has_every_public_name_once() -> None:
    text = (ROOT / "docs/reference/python.md").read_text()
    assert sorted(re.findall(r"^::: tune_easytrain\.(\w+)$", text, re.MULTILINE)) == sorted(te.__all__)


def test_the_reference_shows_what_docstrings_and_commands_say(site: Path) -> None:
    names = (site / "reference/python.html").read_text()
    assert all(f'id="tune_easytrain.{name}"' in names for name in te.__all__)
    assert "Leave in every" in names
    assert "<blockquote>" not in names  # which examples would be that are no code
    page = (site / "reference/command-line.html").read_text()
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert f"tune-easytrain {name}</code>" in page, name
        for parameter in command.params:
            option = parameter.opts[0]
            assert parameter.hidden or option in page or not option.startswith("--"), (name, option)


# Links, length, versions


def anchors(doc: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", (ROOT / doc).read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT.resolve()))), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 225


def test_the_changelog_knows_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == te.__version__
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_one_that_is_named() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_places_to_set_in_the_cluster_file_are_those_that_the_readme_names() -> None:
    places = re.findall(r"# SET: (?:your|the) (\w+)", (ROOT / "cluster/gpu.yaml").read_text())
    assert places == ["region", "image"]
    assert "region and image in the file itself" in (ROOT / "README.md").read_text()


def test_the_settings_of_a_cluster_are_those_of_its_file() -> None:
    text = (ROOT / "cluster/settings.sh").read_text()
    there = dict(re.findall(r"^(?:export )?([A-Z0-9_]+)=(\S+)", text, re.MULTILINE))
    rows = table_below("docs/cluster.md", "## What you set")
    assert {code(name): code(default) for name, default, _ in rows}.items() <= there.items()
    assert there.keys() - {code(name) for name, *_ in rows} == {
        "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED",
    }  # fmt: skip


def rows_of_table(doc: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first heading is this."""
    lines = (ROOT / doc).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_batch_size_study_is_the_one_that_was_measured() -> None:
    frame = pd.read_csv(ROOT / "benchmarks" / "iqa_severity_h100.csv")
    rows = rows_of_table("docs/iqa.md", "E")
    arms = frame.groupby(["batch.effective_batch_size", "accumulation_steps"], sort=True)
    assert len(rows) == len(arms) == 6
    for (size, srcc, _, steps, peak), ((effective, pieces), trials) in zip(rows, arms, strict=True):
        made = f" as {pieces} × {effective // pieces}" if pieces > 1 else ""
        assert size == f"{effective}{made}"
        assert srcc == f"{trials['val_srcc_best'].mean():.2f} ± {trials['val_srcc_best'].std():.2f}"
        assert int(steps) == (trials["optimizer_steps"] / trials["epochs"]).unique().item()
        assert float(peak) == round(trials["peak_memory_bytes"].max() / 2**20, 1)
        assert f"| {size} | 10 | {srcc} |" in (ROOT / "benchmarks" / "iqa_severity_h100.md").read_text()


def test_the_dashboard_s_speed_is_the_one_that_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "dashboard_2_cores.json").read_text())
    columns = ("first_paint_seconds", "update_seconds", "behind_seconds", "most_behind_seconds")
    expected = [[view["view"], *(f"{view[name]:.2f}" for name in columns)] for view in measured["views"]]
    assert rows_of_table("docs/dashboard.md", "page") == expected
