from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sequences
import torch
from torch import nn
from toys import build_task

from tune_easytrain import ConfigError, Task
from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.errors import Fault
from tune_easytrain.model_check import check_models
from tune_easytrain.task_source import pickle_function

SWEEP = """
batch: {effective_batch_size: 8}
grid_search:
  grid:
    model.type:
    - small
    - meduim
    - large
    hp.batch_size: [4, 4, 4]
"""


def sweep(folder: Path, text: str = SWEEP) -> SweepConfig:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return load_config(path)


def faults(config: SweepConfig, build: Any = build_task) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        check_models(config, pickle_function(build, "task"))
    return caught.value.faults


def task_with(model: Any) -> Task:
    return Task(
        model=model,
        loss=lambda model, batch: batch,
        optimizer=lambda model: torch.optim.SGD(model.parameters()),
        train_data=lambda: [],
    )


def test_models_are_counted_once_however_they_are_trained() -> None:
    grid = {"model.type": ["small", "large"], "hp.learning_rate": [0.1, 0.2, 0.3]}
    config = load_config({"grid_search": {"grid": grid}, "batch": {"effective_batch_size": 8}})
    assert check_models(config, pickle_function(build_task, "task")) == 2


def test_models_are_built_without_storage() -> None:
    def huge() -> nn.Module:
        return nn.Linear(2**20, 2**20)  # 4 TiB

    config = load_config({"batch": {"effective_batch_size": 8}, "run": {"metric": "train_loss"}})
    assert check_models(config, pickle_function(lambda config: task_with(huge), "task")) == 1


def test_a_metric_that_the_loop_will_not_report_is_told_with_the_nearest() -> None:
    (fault,) = faults(
        load_config(
            {
                "batch": {"effective_batch_size": 8},
                "config": {"model": {"type": "small"}},
                "run": {"metric": "val_los"},
            }
        )
    )
    assert (fault.path, fault.remedy) == (
        "run.metric",
        "did you mean 'val_loss' or 'train_loss'?",
    )


def test_an_unknown_name_is_told_at_its_line_with_the_nearest(tmp_path: Path) -> None:
    (fault,) = faults(sweep(tmp_path))
    assert (fault.line, fault.path) == (7, "grid_search.grid.model.type[1]")
    assert fault.source.endswith("sweep.yaml")
    assert fault.problem == "unknown name 'meduim'"
    assert fault.remedy == "did you mean 'medium'?"


def test_only_the_trials_that_will_run_are_checked(tmp_path: Path) -> None:
    assert check_models(sweep(tmp_path), pickle_function(build_task, "task"), max_experiments=1) == 1


def test_every_model_that_cannot_be_built_is_told(tmp_path: Path) -> None:
    text = SWEEP.replace("large", "lrge")
    assert [(fault.line, fault.problem) for fault in faults(sweep(tmp_path, text))] == [
        (7, "unknown name 'meduim'"),
        (8, "unknown name 'lrge'"),
    ]


def test_a_bug_in_building_is_told_with_its_type_and_place() -> None:
    def build(config: dict[str, Any]) -> Task:
        return {}["model"]

    (fault,) = faults(load_config({"batch": {"effective_batch_size": 8}}), build)
    assert "KeyError: 'model'" in fault.problem
    assert "test_model_check.py:" in fault.problem


def test_what_is_no_model_is_refused() -> None:
    (fault,) = faults(
        load_config({"batch": {"effective_batch_size": 8}}), lambda config: task_with(lambda: "resnet")
    )
    assert "model() returned a str, not a torch.nn.Module" in fault.problem


def test_what_is_no_task_is_refused() -> None:
    (fault,) = faults(load_config({"batch": {"effective_batch_size": 8}}), lambda config: nn.Linear(1, 1))
    assert "returned a Linear, not a tune_easytrain.Task" in fault.problem


@pytest.mark.parametrize(
    ("batch", "grid", "place"),
    [
        ("max_tokens: 4096", "model.type: small", (2, "batch.max_tokens")),
        ("probe: auto", "batch.max_tokens: [null, 4096]", (5, "grid_search.grid.batch.max_tokens")),
    ],
)
def test_a_limit_in_tokens_for_a_task_without_lengths_is_told_at_its_line(
    tmp_path: Path, batch: str, grid: str, place: tuple[int, str]
) -> None:
    text = f"""
batch: {{effective_batch_size: 8, {batch}}}
grid_search:
  grid:
    {grid}
config: {{model: {{type: small}}, data: {{lengths: [3, 4], hides_lengths: true}}}}
run: {{metric: train_loss}}
"""
    if "model.type" in grid:
        text = text.replace("model: {type: small}, ", "")
    (fault,) = faults(sweep(tmp_path, text), sequences.build_task)
    assert (fault.line, fault.path) == place
    assert fault.problem.startswith("4096 tokens limit nothing")
    assert fault.remedy == "give the task `lengths`, or remove the key"
    known = sweep(tmp_path, text.replace(", hides_lengths: true", ""))
    assert check_models(known, pickle_function(sequences.build_task, "task")) == 1


def no_optimizer(config: dict[str, Any]) -> Task:
    return Task(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: batch,
        val_data=None if config.get("without_data") else list,
    )


@pytest.mark.parametrize(
    ("train", "constants", "told"),
    [
        ("", "{}", "train.function: the task has no optimizer; give it one, or write train.function: none"),
        ("  function: none", "{without_data: true}", "train.function: the task has no val_data"),
    ],
)
def test_a_task_that_cannot_do_what_it_is_asked_for_is_told(
    tmp_path: Path, train: str, constants: str, told: str
) -> None:
    text = (
        f"config: {constants}\ntrain:\n  seed: 0\n{train}\nbatch: {{effective_batch_size: 8}}\n"
        "run: {metric: val_loss}\n"
    )
    (fault,) = faults(sweep(tmp_path, text), no_optimizer)
    assert told in str(fault)


def test_a_task_that_is_only_evaluated_reports_no_training_loss(tmp_path: Path) -> None:
    text = "train: {function: none}\nrun:\n  metric: train_loss\n"
    (fault,) = faults(sweep(tmp_path, text), build_task_of_small)
    assert (fault.path, fault.line) == ("run.metric", 3)


def build_task_of_small(config: dict[str, Any]) -> Task:
    return build_task({**config, "model": {"type": "small"}})
