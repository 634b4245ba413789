from __future__ import annotations

import ast
import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from made_studies import make_run_of
from typer.testing import CliRunner

from tune_easytrain.cli import app
from tune_easytrain.config import load_config
from tune_easytrain.results import SweepResults
from tune_easytrain.search_space import expand_trials

pytest.importorskip("scipy")

CONFIGS = Path(__file__).parents[1] / "configs"
IQA_DEMO, IQA_STUDY = CONFIGS / "iqa_demo.yaml", CONFIGS / "iqa_batch_study.yaml"
SWEEP = """\
name: made
task: tasks/toy.py:build_task
config: {data: {root: /data}}
batch: {effective_batch_size: 16}
train: {epochs: 3}
run: {metric: val_accuracy, mode: max}
"""


def report(*runs: SweepResults) -> str:
    done = CliRunner().invoke(app, ["report", *(run.place for run in runs)])
    assert done.exit_code == 0, done.exception
    return done.output


def commands_of(text: str) -> list[list[str]]:
    """The arguments of every `tune-easytrain run` of a report, as a shell reads them."""
    blocks = re.findall(r"```text\n(.*?)\n```", text, flags=re.DOTALL)
    calls = [block for block in blocks if block.startswith("tune-easytrain run ")]
    return [shlex.split(call.replace("\\\n", ""))[2:] for call in calls]


def planned(arguments: list[str]) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert done.exit_code == 0, done.exception
    return [trial["config"] for trial in json.loads(done.output)]


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    config = json.loads(json.dumps(config))
    for key in keys:
        section, _, name = key.partition(".")
        config.get(section, {}).pop(name, None)
    return config


LISTS = ("grid_search.grid.batch.effective_batch_size=[8, 16]", "grid_search.grid.hp.batch_size=[8, 8]")


@pytest.mark.parametrize(
    ("file", "quick", "overrides"),
    [
        (IQA_DEMO, False, ()),
        (IQA_DEMO, True, ()),
        (IQA_DEMO, False, ("config.data.share=0.25", "train.epochs=1")),
        (IQA_DEMO, True, ("train.epochs=3",)),  # which holds over that of `quick`
        (IQA_DEMO, True, LISTS),
        (
            IQA_DEMO,
            False,
            ("grid_search.grid.train.seed=[4, 5]", "grid_search.grid.model.dropout=[0.1, 0.2]"),
        ),
        (IQA_STUDY, True, ('config.data.root=/it\'s a $HOME "of" photos',)),
        (IQA_STUDY, False, ("grid_search.grid.model.type=[swin_t, swin_s]",)),
    ],
)
def test_every_command_is_the_run_s_own_recipe_with_one_change(
    tmp_path: Path, file: Path, quick: bool, overrides: tuple[str, ...]
) -> None:
    config = load_config(file, overrides=overrides, quick=quick)
    kept = [without(trial, "train.seed", "batch.effective_batch_size") for trial in expand_trials(config)]
    run = make_run_of(tmp_path, file, quick=quick, overrides=overrides)
    commands = commands_of(report(run))
    assert commands
    for arguments in commands:
        assert ("--quick" in arguments) == quick
        trials = planned(arguments)
        assert trials
        for trial in trials:
            assert without(trial, "train.seed", "batch.effective_batch_size") in kept
        assert (
            load_config(file, overrides=arguments[2 if quick else 1 :][1::2], quick=quick).train
            == config.train
        )


GRIDS = {
    "paired by rule": "{model.type: [s, l], hp.batch_size: [4, 8]}",
    "hp.batch_size is all there is": "{hp.batch_size: [4, 8], model.type: [s]}",
    "a mapping as a value": "{hp: [{batch_size: 4, rate: 0.1}, {batch_size: 8, rate: 0.2}]}",
    "lists as values": "{model.widths: [[8, 8], [16]], model.note: [null, 'ä off', \"it's\"]}",
    "drawn": "{hp.rate: {loguniform: [1.0e-4, 0.1]}}",
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(
    "run",
    [
        "{metric: val_accuracy, mode: max}",
        "{metric: val_accuracy, mode: max, scheduler: {name: asha, grace_period: 3}}",
        "{metric: val_accuracy, mode: max, search: optuna, num_samples: 4}",
    ],
    ids=["plain", "asha", "optuna"],
)
def test_what_is_paired_drawn_or_searched_is_planned_as_one_arm(tmp_path: Path, grid: str, run: str) -> None:
    file = tmp_path / "sweep.yaml"
    text = SWEEP.replace("{metric: val_accuracy, mode: max}", run)
    if "batch_size" in grid and "model.type: [s]" in grid:
        text = text.replace("batch: {effective_batch_size: 16}\n", "")
    file.write_text(f"{text}grid_search: {{grid: {grid}}}\n")
    results = make_run_of(tmp_path, file)
    original = [without(trial, "train.seed") for trial in expand_trials(load_config(file))]
    *more_seeds, larger = [planned(arguments) for arguments in commands_of(report(results))]
    assert len(more_seeds) == len(original)
    for trials, trial in zip(more_seeds, original, strict=True):
        assert [without(other, "train.seed") for other in trials] == [trial] * 3
        assert [other["train"]["seed"] for other in trials] == [1, 2, 3]
    assert len(larger) == 1
    size = larger[0]["batch"]["effective_batch_size"] or larger[0]["hp"]["batch_size"]
    assert size == (32 if "effective" in text else 16)


def test_a_population_is_measured_without_its_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    scheduler = "scheduler: {name: pbt, perturbation_interval: 1}, num_samples: 4}"
    file.write_text(
        SWEEP.replace("mode: max}", f"mode: max, {scheduler}")
        + "grid_search: {grid: {hp.rate: {loguniform: [1.0e-4, 0.1]}}}\n"
    )
    for arguments in commands_of(report(make_run_of(tmp_path, file))):
        assert planned(arguments)


def test_a_scheduler_that_could_stop_nothing_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        SWEEP.replace("mode: max}", "mode: max, scheduler: {name: asha, grace_period: 5}}")
        + "grid_search: {grid: {train.epochs: [2, 9]}}\n"
    )
    commands = commands_of(report(make_run_of(tmp_path, file)))
    assert ["run.scheduler=null" in arguments for arguments in commands] == [True, False, True]
    assert all(planned(arguments) for arguments in commands)


def test_what_failed_is_measured_with_its_own_seeds(tmp_path: Path) -> None:
    run = make_run_of(
        tmp_path, IQA_DEMO, overrides=["grid_search.grid.train.seed=[3, 7]"],
        metric=lambda config: None if config["batch"]["effective_batch_size"] == 16 else 0.5,
    )  # fmt: skip
    text = report(run)
    assert "E = 16: every trial failed: OutOfMemoryError" in text
    assert [trial["train"]["seed"] for trial in planned(commands_of(text)[0])] == [3, 7]


def test_only_the_run_that_has_not_ended_is_gone_on_with(tmp_path: Path) -> None:
    whole = make_run_of(tmp_path, IQA_DEMO)
    begun = make_run_of(tmp_path, IQA_DEMO, overrides=["train.epochs=1"], max_trials=1)
    text = report(whole, begun)
    assert f"tune-easytrain resume {begun.place}\n" in text
    assert f"tune-easytrain resume {whole.place}\n" not in text


def test_each_arm_of_several_runs_has_the_recipe_of_its_own(tmp_path: Path) -> None:
    runs = [make_run_of(tmp_path, IQA_DEMO), make_run_of(tmp_path, IQA_DEMO, quick=True)]
    commands = commands_of(report(*runs))
    epochs = [{trial["train"]["epochs"] for trial in planned(arguments)} for arguments in commands]
    assert epochs[:6] == [{12}] * 3 + [{2}] * 3


def test_a_file_that_has_changed_since_is_not_begun_with(tmp_path: Path) -> None:
    file, task = tmp_path / "project/sweep.yaml", tmp_path / "project/tasks/toy.py"
    task.parent.mkdir(parents=True)
    task.write_text("def build_task(config): ...\n")
    file.write_text(SWEEP)
    run = make_run_of(tmp_path / "runs", file, overrides=["config.data.root=/mnt"])
    assert {arguments[0] for arguments in commands_of(report(run))} == {str(file)}
    file.write_text(SWEEP.replace("epochs: 3", "epochs: 30"))
    text = report(run)
    assert "is gone or no longer says what was run" in text
    for arguments in commands_of(text):
        assert arguments[0] == str(run.run_dir / "sweep.json")
        assert f"task={task}:build_task" in arguments
        (config, *_) = planned(arguments)
        assert (config["train"]["epochs"], config["data"]["root"]) == (3, "/mnt")


def test_what_python_gave_is_run_from_python(tmp_path: Path) -> None:
    sweep = {
        "config": {"data": {"root": "/it's"}},
        "grid_search": {"grid": {"batch.effective_batch_size": [8, 16], "hp.batch_size": [8, 8]}},
        "run": {"metric": "val_accuracy", "mode": "max"},
    }
    run = make_run_of(tmp_path, copy.deepcopy(sweep))
    text = report(run)
    assert not commands_of(text)
    calls = [
        ast.parse(call).body[0] for call in re.findall(r"^te\.run\(.*?^\)", text, re.DOTALL | re.MULTILINE)
    ]
    assert len(calls) == 3
    for call in calls:
        assert isinstance(call, ast.Expr)
        assert isinstance(call.value, ast.Call)
        file = ast.literal_eval(call.value.args[0])
        (overrides,) = [ast.literal_eval(word.value) for word in call.value.keywords]
        for trial in expand_trials(load_config(file, overrides=overrides)):
            assert trial["data"] == {"root": "/it's"}


def test_there_is_no_batch_larger_than_the_training_set(tmp_path: Path) -> None:
    from tune_easytrain.events import Planned, append_events
    from tune_easytrain.run_directory import RunDirectory, trial_id

    run = make_run_of(
        tmp_path, IQA_DEMO, overrides=["grid_search.grid.batch.effective_batch_size=[16, 24, 999]"]
    )
    plan = Planned(
        device="cpu", budget_bytes=1, effective_batch_size=100, microbatch_size=16, accumulation_steps=7,
        num_workers=1,
    )  # fmt: skip
    append_events(RunDirectory(run.run_dir).trial_path(trial_id(2)), [plan])
    text = report(run)
    assert "E = 100 is the whole training set" in text
    assert "To measure E" not in text
