from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tune_easytrain.cli import main
from tune_easytrain.config import load_config
from tune_easytrain.events import Created, Failed, Reported, Started, append_events
from tune_easytrain.run_directory import RunDirectory, trial_id

TOYS = Path(__file__).with_name("toys.py")

NINE = """
name: nine
grid_search:
  grid:
    model.type: [r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v1_b, mvit_v2_s, swin3d_b, swin3d_s, swin3d_t]
    hp.batch_size: [128, 64, 128, 32, 16, 16, 16, 16, 16]
    hp.learning_rate: [0.001]
    optimizer.name: [adam]
batch: {effective_batch_size: 128}
"""

TOY_SWEEP = f"""
task: {TOYS}:build_task
batch: {{effective_batch_size: 8}}
grid_search:
  grid:
    model.type: [small, large]
    hp.learning_rate: [0.1]
"""


@dataclass
class Answer:
    code: int
    out: str
    err: str


Ask = Callable[..., Answer]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Call the command line with its own exit code, output and errors."""

    def ask(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["tune-easytrain", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Answer(int(caught.value.code or 0), captured.out, captured.err)

    return ask


@pytest.fixture
def nine(tmp_path: Path) -> Path:
    path = tmp_path / "nine.yaml"
    path.write_text(NINE)
    return path


@pytest.fixture
def toy_sweep(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY_SWEEP)
    return path


def test_plan_tells_nine_trials_from_eighty_one(ask: Ask, nine: Path) -> None:
    answer = ask("plan", nine, "--hours-per-trial", 2)
    assert answer.code == 0
    assert "Mode: " in answer.out
    assert "9 trials; the Cartesian product would have been 81, 89 % fewer." in answer.out
    assert "At 2 h a trial: 18 h against 162 h." in answer.out
    assert "Warning" not in answer.out
    rows = [
        line.split()
        for line in answer.out.splitlines()
        if line.strip()[:1].isdigit() and "trials" not in line
    ]
    assert rows[0] == ["0", "r3d_18", "128", "0.001", "adam", "128", "128"]
    assert rows[-1] == ["8", "swin3d_t", "16", "0.001", "adam", "128", "16"]
    assert len(rows) == 9


def test_plan_as_json_is_the_trials_configs(ask: Ask, nine: Path) -> None:
    trials = json.loads(ask("plan", nine, "--json").out)
    assert len(trials) == 9
    assert trials[3]["config"]["model"]["type"] == "s3d"
    assert (trials[3]["effective_batch_size"], trials[3]["microbatch_limit"]) == (128, 32)


@pytest.mark.parametrize("option", ["--max-experiments", "--max_experiments"])
def test_max_experiments_keeps_the_first_of_the_files_order(ask: Ask, nine: Path, option: str) -> None:
    trials = json.loads(ask("plan", nine, option, 3, "--json").out)
    assert [trial["config"]["model"]["type"] for trial in trials] == ["r3d_18", "mc3_18", "r2plus1d_18"]
    assert "3 of 9 trials" in ask("plan", nine, option, 3).out


def test_set_overrides_the_file(ask: Ask, nine: Path) -> None:
    trials = json.loads(ask("plan", nine, "--set", "batch.effective_batch_size=32", "--json").out)
    assert {trial["effective_batch_size"] for trial in trials} == {32}


def test_quick_is_what_the_file_says_it_is(ask: Ask, nine: Path) -> None:
    assert (ask("plan", nine, "--quick").code, ask("validate", nine, "--quick").code) == (2, 2)
    nine.write_text(nine.read_text() + "quick: {train.epochs: 2, batch.effective_batch_size: 32}\n")
    out = ask("plan", nine, "--quick").out
    assert out.startswith("Quick trial: train.epochs=2, batch.effective_batch_size=32.\n")
    trials = json.loads(ask("plan", nine, "--quick", "--set", "train.epochs=3", "--json").out)
    assert [trial["config"]["train"]["epochs"] for trial in trials] == [3] * 9
    assert {trial["effective_batch_size"] for trial in trials} == {32}
    assert "Quick" not in ask("plan", nine).out


def test_trials_that_differ_in_batch_size_are_warned_of(ask: Ask, nine: Path) -> None:
    out = ask("plan", nine, "--set", "batch={}").out
    assert "trials differ in effective batch size: 16 … 128" in out
    assert "batch: {effective_batch_size: 128}" in out


def test_plan_on_a_gpu_tells_what_each_trial_needs_there(ask: Ask, toy_sweep: Path) -> None:
    answer = ask("plan", toy_sweep, "--device", "h100")
    assert (answer.code, answer.err) == (0, "")
    assert "2 of 2 trials fit on H100 80GB (79.1 GiB)." in answer.out
    row = next(line for line in answer.out.splitlines() if " large " in line)
    assert row.split()[:6] == ["1", "large", "0.1", "8", "8", "1"]
    assert row.split()[-1] == "yes"


def test_plan_on_a_gpu_as_json_has_the_keys_that_are_documented(ask: Ask, toy_sweep: Path) -> None:
    toy_sweep.write_text(TOY_SWEEP.replace("[small, large]", "[small]") + "    toy.fault: [none, bug]\n")
    answer = ask("plan", toy_sweep, "--memory", "1GiB", "--json")
    assert answer.code == 1
    small, faulty = json.loads(answer.out)
    assert small["config"]["model"]["type"] == "small"
    assert small["memory_budget_bytes"] == int(0.9 * 2**30) - 256 * 2**20
    assert 0 < small["estimated_peak_bytes"] < 2**28
    assert (small["microbatch_size"], small["accumulation_steps"], small["effective_batch_size"]) == (8, 1, 8)
    assert (small["fits"], small["error"]) == (True, None)
    assert faulty["estimated_peak_bytes"] is faulty["fits"] is None
    assert "a bug in the task" in faulty["error"]


def test_plan_on_a_gpu_tells_an_unknown_model_at_its_line(ask: Ask, toy_sweep: Path) -> None:
    toy_sweep.write_text(TOY_SWEEP.replace("large", "lrge"))
    answer = ask("plan", toy_sweep, "--memory", "1GiB")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"error: {toy_sweep}:6: grid_search.grid.model.type[1]: unknown name 'lrge'")


def test_write_pairs_prints_yaml_and_nothing_else(ask: Ask, toy_sweep: Path) -> None:
    answer = ask("plan", toy_sweep, "--memory", "1GiB", "--write-pairs")
    assert (answer.code, answer.err) == (0, "")
    assert yaml.safe_load(answer.out) == {"model.type": ["small", "large"], "hp.batch_size": [8, 8]}


def test_a_gpu_on_which_nothing_fits_has_no_pair_list(ask: Ask, toy_sweep: Path) -> None:
    answer = ask("plan", toy_sweep, "--memory", "1MiB", "--write-pairs")
    assert (answer.code, answer.out) == (1, "")
    assert "left out: small: one sample needs" in answer.err
    assert "0 of 2 trials fit" in ask("plan", toy_sweep, "--memory", "1MiB").out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "H100", "--memory", "24GiB"], "give one of them"),
        (["--device", "A100"], "'A100 80GB' or 'A100 40GB'"),
        (["--device", "H1O0"], "did you mean 'H100 80GB'"),
        (["--memory", "24 gigs"], "--memory: '24 gigs' is not a size; write a size such as 24GiB"),
        (["--memory", "0"], "--memory: 0 is less than one byte"),
        (["--memory", "24"], "--memory: '24' would be bytes; write the unit, such as 24GiB"),
        (["--write-pairs"], "add --device 'H100 80GB' or --memory 24GiB"),
        (["--device", "H100", "--power-of-two"], "add --write-pairs"),
        (["--device", "H100", "--write-pairs", "--json"], "give one of them"),
    ],
)
def test_options_that_do_not_go_together_are_bad_input(
    ask: Ask, toy_sweep: Path, options: list[str], told: str
) -> None:
    answer = ask("plan", toy_sweep, *options)
    assert (answer.code, answer.out) == (2, "")
    (line,) = answer.err.strip().splitlines()
    assert told in line


def test_memory_is_estimated_of_a_task(ask: Ask, nine: Path) -> None:
    answer = ask("plan", nine, "--device", "H100")
    assert answer.code == 2
    assert "the sweep names no task" in answer.err


def test_probe_shows_each_attempt_and_the_estimate_beside_it(ask: Ask, toy_sweep: Path) -> None:
    answer = ask("probe", toy_sweep, "--trial", 1)
    assert (answer.code, answer.err) == (0, "")
    device, attempt, *_, comparison = answer.out.splitlines()
    assert device.startswith("On cpu, budget ")
    assert attempt.startswith("micro-batch 8: fits")
    assert "Effective batch size 8 in 1 micro-batches of at most 8." in answer.out
    assert comparison.startswith("Estimated peak ")


def test_probe_as_json_is_the_result_and_the_attempts_go_to_standard_error(ask: Ask, toy_sweep: Path) -> None:
    answer = ask("probe", toy_sweep, "--trial", 0, "--set", "batch.probe=off", "--json")
    result = json.loads(answer.out)
    assert "micro-batch 8: fits" in answer.err
    assert result["config"]["model"]["type"] == "small"
    assert (result["microbatch_size"], result["accumulation_steps"]) == (8, 1)
    assert (result["largest_fitting"], result["bounded_by"]) == (8, "limit")
    assert [attempt["outcome"] for attempt in result["attempts"]] == ["fits"]
    assert result["estimated_peak_bytes"] > 0


@pytest.mark.parametrize("number", [-1, 2])
def test_a_trial_that_is_not_there_is_bad_input(ask: Ask, toy_sweep: Path, number: int) -> None:
    answer = ask("probe", toy_sweep, "--trial", number)
    assert (answer.code, answer.out) == (2, "")
    assert f"--trial {number}: the sweep has trials 0 to 1" in answer.err


def test_a_probe_that_finds_no_memory_for_one_sample_tells_what_it_tried(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "hungry.yaml"
    path.write_text(
        f"task: {TOYS}:build_hungry_task\nbatch: {{effective_batch_size: 2, memory_budget: 4MiB}}\n"
    )
    answer = ask("probe", path, "--trial", 0)
    assert answer.code == 1
    assert "micro-batch 1: out of memory" in answer.out
    assert answer.err.startswith("error: not even one sample fits into 4.0 MiB")


def test_a_bug_in_the_task_is_told_with_its_traceback_where_it_is(ask: Ask, toy_sweep: Path) -> None:
    answer = ask("probe", toy_sweep, "--trial", 0, "--set", "config.toy.fault=bug")
    assert answer.code == 1
    assert "KeyError: 'a bug in the task'" in answer.err
    assert "toys.py" in answer.err


def test_validate_builds_every_model(ask: Ask, toy_sweep: Path) -> None:
    answer = ask("validate", toy_sweep)
    assert (answer.code, answer.err) == (0, "")
    assert "valid; 2 trials, 2 distinct models" in answer.out


def test_an_unknown_model_is_told_in_one_line_without_a_traceback(ask: Ask, toy_sweep: Path) -> None:
    toy_sweep.write_text(TOY_SWEEP.replace("large", "lrge"))
    answer = ask("validate", toy_sweep)
    assert (answer.code, answer.out) == (2, "")
    (line,) = answer.err.strip().splitlines()
    assert f"{toy_sweep}:6" in line
    assert "unknown name 'lrge'; did you mean 'large'?" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "trainepochs"], "'trainepochs' is not key=value"),
        (["--set", "train.epochs=none"], "train.epochs"),
        (["--set", "train.epohs=3"], "did you mean 'epochs'?"),
    ],
)
def test_a_bad_override_is_bad_input(ask: Ask, toy_sweep: Path, arguments: list[str], told: str) -> None:
    answer = ask("validate", toy_sweep, *arguments)
    assert answer.code == 2
    assert told in answer.err
    assert "--set" in answer.err


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_a_file_that_is_not_there_is_bad_input(ask: Ask, tmp_path: Path, command: str) -> None:
    answer = ask(command, tmp_path / "missing.yaml")
    assert answer.code == 2
    assert "missing.yaml" in answer.err


@pytest.mark.parametrize("command", ["results", "resume"])
def test_a_folder_that_is_no_run_directory_is_bad_input(ask: Ask, tmp_path: Path, command: str) -> None:
    answer = ask(command, tmp_path)
    assert answer.code == 2
    assert "is not a run directory" in answer.err


def make_run(folder: Path, toy_sweep: Path) -> Path:
    directory = RunDirectory.create(folder, "toy")
    directory.save_sweep(load_config(toy_sweep).resolved())
    config: dict[str, Any] = {"model": {"type": "[small]"}, "hp": {"learning_rate": 0.1}}
    report = Reported(metrics={"epoch": 1, "val_loss": 0.25}, peak_memory_bytes=1)
    append_events(directory.trial_path(trial_id(0)), [Started(config=config), report])
    failed = [Created(config=config), Failed(error="KeyError: 'x'")]
    append_events(directory.trial_path(trial_id(1)), failed)
    return directory.path


def test_results_show_every_trial_and_the_best(ask: Ask, tmp_path: Path, toy_sweep: Path) -> None:
    run_dir = make_run(tmp_path, toy_sweep)
    answer = ask("results", run_dir, "--csv", tmp_path / "out.csv")
    assert answer.code == 0
    for text in ("trial_00000", "[small]", "KeyError: 'x'", "Best val_loss: 0.25 (trial_00000)"):
        assert text in answer.out
    assert (tmp_path / "out.csv").read_text().startswith("trial_id,state,error,model.type")


def test_results_as_json_are_the_frame(ask: Ask, tmp_path: Path, toy_sweep: Path) -> None:
    rows = json.loads(ask("results", make_run(tmp_path, toy_sweep), "--json").out)
    assert [row["state"] for row in rows] == ["probing", "failed"]
    assert rows[0]["val_loss_best"] == 0.25
    assert rows[1]["val_loss_best"] is None


def ids(answer: Answer) -> list[str]:
    return [
        line.split()[0]
        for line in answer.out.splitlines()
        if line.startswith(" trial_0") and "failed:" not in line
    ]


def test_results_of_some_trials_in_another_order(ask: Ask, tmp_path: Path, toy_sweep: Path) -> None:
    run_dir = make_run(tmp_path, toy_sweep)
    assert ids(ask("results", run_dir, "--sort", "-trial_id")) == ["trial_00001", "trial_00000"]
    assert ids(ask("results", run_dir, "--sort", "val_loss")) == ["trial_00000", "trial_00001"]
    files = ["--csv", tmp_path / "some.csv", "--parquet", tmp_path / "some.parquet"]
    where = ["--where", "state == failed and val_loss == null", "--where", "hp.learning_rate > 0"]
    answer = ask("results", run_dir, *where, *files)
    assert ids(answer) == ["trial_00001"]
    assert "Best" not in answer.out
    assert pd.read_csv(tmp_path / "some.csv")["trial_id"].tolist() == ["trial_00001"]
    assert pd.read_parquet(tmp_path / "some.parquet")["trial_id"].tolist() == ["trial_00001"]
    assert [row["trial_id"] for row in json.loads(ask("results", run_dir, *where, "--json").out)] == [
        "trial_00001"
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--where", "modl.type == 3"], "no column 'modl.type'; did you mean 'model.type'?"),
        (["--where", "__import__('os').system('touch owned')"], "one of == != < <= > >= is missing"),
        (["--sort", "val_los"], "no column 'val_los'; did you mean 'val_loss'"),
        (["--compare", "gone"], "gone is not a run directory"),
        (["--errors", "--json"], "leave out --compare and --json"),
    ],
)
def test_results_that_cannot_be_chosen_are_bad_input(
    ask: Ask, tmp_path: Path, toy_sweep: Path, options: list[str], told: str
) -> None:
    answer = ask("results", make_run(tmp_path, toy_sweep), *options)
    assert (answer.code, answer.out) == (2, "")
    (line,) = answer.err.strip().splitlines()
    assert told in line


def test_results_are_compared_with_another_runs(ask: Ask, tmp_path: Path, toy_sweep: Path) -> None:
    run_a, run_b = (make_run(tmp_path, toy_sweep) for _ in range(2))
    answer = ask("results", run_a, "--compare", run_b, "--csv", tmp_path / "compared.csv")
    assert answer.code == 0
    assert answer.out.split()[:4] == ["trial", "a", "trial", "b"]
    assert "Trials: 2 in both, 0 in a alone, 0 in b alone" in answer.out
    written = pd.read_csv(tmp_path / "compared.csv")
    assert written["val_loss_difference"].tolist()[:1] == [0.0]
    some = ask(
        "results",
        run_a,
        "--compare",
        run_b,
        "--where",
        "state_a == failed",
        "--sort",
        "-trial_id_b",
        "--json",
    )
    assert [row["trial_id_a"] for row in json.loads(some.out)] == ["trial_00001"]


def test_errors_are_shown_whole_where_they_are_asked_for(ask: Ask, tmp_path: Path, toy_sweep: Path) -> None:
    run_dir = make_run(tmp_path, toy_sweep)
    error = f"ValueError: {'a long story, ' * 40}and its end"
    events = [Failed(error=error, details="Traceback (most recent call last):\n  in the task\n" + error)]
    append_events(run_dir / "trials" / "trial_00001.jsonl", events)
    short, whole = ask("results", run_dir), ask("results", run_dir, "--errors")
    assert "trial_00001 failed: ValueError: a long story" in short.out
    assert "and its end" not in short.out
    assert "Whole errors: tune-easytrain results" in short.out
    assert f"trial_00001 failed: {error}\nTraceback (most recent call last):\n  in the task\n" in whole.out
    assert ask("results", run_dir, "--errors", "--where", "state != failed").out == "No trial failed.\n"


def test_a_terminal_of_80_columns_shows_whole_cells(tmp_path: Path, toy_sweep: Path) -> None:
    """On a real terminal, since that is where the width comes from."""
    run_dir = make_run(tmp_path, toy_sweep)
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "tune_easytrain", "results", str(run_dir)]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdout=terminal, env=environment | {"TERM": "xterm"}) as process:
        os.close(terminal)
        printed = b""
        with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
            while part := os.read(controller, 4096):
                printed += part
    os.close(controller)
    assert process.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed.decode()).splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("trial_00001 failed"))
    table = lines[:end]
    assert max(map(len, table)) <= 80
    assert sum(line.startswith(" trial_0") for line in table) == 2
    (row,) = [line.split() for line in table if line.startswith(" trial_00000")]
    assert row[:2] == ["trial_00000", "[small]"]
    assert row[-1] == "0.25"
    assert any(line.startswith("Not shown at this width: tries") for line in lines)


@pytest.mark.parametrize("command", ["validate", "plan", "probe", "run", "resume", "results"])
def test_every_command_helps_with_an_example(ask: Ask, command: str) -> None:
    answer = ask(command, "--help")
    assert answer.code == 0
    assert f"tune-easytrain {command} " in answer.out
