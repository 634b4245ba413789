"""Check a sweep's models before anything runs: each distinct one is built without storage."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import torch

from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import BadInputError, ConfigError, Fault, TaskError, UnknownNameError, did_you_mean
from tune_easytrain.search_space import build_trial_space, grid_keys, grid_points
from tune_easytrain.settings import EVALUATE_ONLY
from tune_easytrain.strategies import with_strategies
from tune_easytrain.task import Task
from tune_easytrain.trial_space import MODEL_KEY, SECTION_NAMES, value_at
from tune_easytrain.yaml_source import read_file

_MAX_TOKENS_KEY = "batch.max_tokens"
_NOT_OF_THE_MODEL = ("hp", "optimizer", "scheduler", "batch", "train", "memory")


def check_models(config: SweepConfig, task_payload: bytes, max_experiments: int | None = None) -> int:
    """Build the model of every distinct config on torch's `meta` device and return how many there are.

    Raises ConfigError with one fault per model that cannot be built, at the line that asks for it. What
    fails for want of data is left to the trial.
    """
    build_task, space = cloudpickle.loads(task_payload), build_trial_space(config)
    keys, built, faults = grid_keys(config), set(), []
    known: list[str] = []
    task: Task | None = None
    failures: list[tuple[tuple[Any, ...], dict[str, Any], Exception]] = []
    for point in grid_points(config, max_experiments):
        trial = space.config(point)
        signature = _model_signature(trial)
        if signature in built:
            continue
        built.add(signature)
        try:
            task = _build_on_meta(build_task, trial)
            known.append(str(value_at(trial, MODEL_KEY)))
        except Exception as error:  # noqa: BLE001 -- whatever the user's code raises becomes a fault
            failures.append((point, trial, error))
    for point, trial, failure in failures:
        faults.append(_fault(config, dict(zip(keys, point, strict=True)), trial, failure, known))
    if task is not None:
        faults += _task_faults(config, task)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))  # models may share what is wrong
    return len(built)


def _task_faults(config: SweepConfig, task: Task) -> list[Fault]:
    """Return what is asked of a task that it cannot do."""
    faults, function = [], config.train.function
    if function is None and not task.is_trained:
        remedy = "give it one, or write train.function: none to evaluate without training"
        faults.append(_fault_at(config, ("train", "function"), "the task has no optimizer", remedy))
    elif function == EVALUATE_ONLY and task.val_data is None:
        problem = "the task has no val_data, so there is nothing to evaluate"
        faults.append(_fault_at(config, ("train", "function"), problem, "give it some, or remove the key"))
    elif config.train.own_function is None:
        reported = task.only_evaluated() if function == EVALUATE_ONLY else task
        faults += _metric_faults(config, reported.metric_names)
    return faults + ([] if task.lengths is not None else _token_faults(config))


def _metric_faults(config: SweepConfig, names: Sequence[str]) -> list[Fault]:
    """Return the fault that the built-in loop will not report the sweep's metric, if it will not."""
    metric = config.run.metric
    if metric in names:
        return []
    problem = f"{metric!r} is not reported by this task"
    return [_fault_at(config, ("run", "metric"), problem, did_you_mean(metric, names))]


def _token_faults(config: SweepConfig) -> list[Fault]:
    """Return the fault that micro-batches are limited by tokens, for a task without lengths."""
    listed = config.grid_search.grid.get(_MAX_TOKENS_KEY, (config.batch.max_tokens,))
    given = [value for value in listed if value is not None] if isinstance(listed, tuple) else [listed]
    if not given:
        return []
    problem = f"{given[0]} tokens limit nothing: the task does not know how long its samples are"
    remedy = "give the task `lengths`, or remove the key"
    in_grid = _MAX_TOKENS_KEY in config.grid_search.grid
    path = ("grid_search", "grid", _MAX_TOKENS_KEY) if in_grid else tuple(_MAX_TOKENS_KEY.split("."))
    return [_fault_at(config, path, problem, remedy)]


def _fault_at(config: SweepConfig, path: tuple[str, ...], problem: str, remedy: str) -> Fault:
    """Return a fault at a place of the sweep file, or of the dict in its place."""
    if config.source_path is None:
        return Fault("<config>", ".".join(path[2:] if path[0] == "grid_search" else path), problem, remedy)
    source, _ = read_file(config.source_path)
    return source.fault(path, problem, remedy)


def _build_on_meta(build_task: Any, trial: dict[str, Any]) -> Task:
    task = build_task(trial)
    if not isinstance(task, Task):
        kind = type(task).__name__
        raise TaskError(f"the task function returned a {kind}, not a tune_easytrain.Task (no `return`?)")
    _check_fields(task)
    memory = trial["memory"]
    with torch.device("meta"):
        model = with_strategies(task, checkpointing=memory["checkpointing"]).model()
    if not isinstance(model, torch.nn.Module):
        raise TaskError(f"the task's model() returned a {type(model).__name__}, not a torch.nn.Module")
    return task


def _check_fields(task: Task) -> None:
    """Raise TaskError for what is an object where the task wants a function that builds it."""
    if isinstance(task.model, torch.nn.Module):
        raise TaskError("the task's model is a module itself; give a function that builds it: lambda: ...")
    for name, build in task.metrics.items():
        if isinstance(build, torch.nn.Module):  # torchmetrics are modules
            raise TaskError(
                f"metrics[{name!r}] is a metric itself; give a function that builds it: lambda: ..."
            )
    if task.metrics and task.predict is None:
        raise TaskError("the task has metrics but no `predict` to give them predictions and targets")


def _model_signature(trial: Mapping[str, Any]) -> str:
    """Return what the model may depend on; optimizer and batch settings do not make another model."""
    parts = {key: value for key, value in trial.items() if key not in _NOT_OF_THE_MODEL}
    return json.dumps([parts, trial["memory"]["checkpointing"]], sort_keys=True, default=repr)


def _fault(
    config: SweepConfig,
    values: Mapping[str, Any],
    trial: Mapping[str, Any],
    error: Exception,
    known: Sequence[str],
) -> Fault:
    key = error.key if isinstance(error, UnknownNameError) else MODEL_KEY
    value = value_at(trial, key)
    problem, remedy = f"{value!r}: building the model failed: {type(error).__name__}: {error}", ""
    if isinstance(error, UnknownNameError):
        problem, remedy = f"unknown name {error.value!r}", did_you_mean(error.value, error.valid)
    elif value is not None and str(value) in str(error):
        remedy = did_you_mean(value, [*known, *_torchvision_names(error)])
    elif isinstance(error, BadInputError):
        problem = str(error)
    else:
        problem += _where(error)
    source, line, path = _place(config, key, value if key in values else None)
    return Fault(source, path, problem, remedy, line)


def _place(config: SweepConfig, key: str, grid_value: Any) -> tuple[str, int | None, str]:
    """Return file, line and YAML path of a grid key's value, or of a constant."""
    if config.source_path is None:
        return "<config>", None, key
    source, _ = read_file(config.source_path)
    parts = key.split(".")
    path: tuple[str | int, ...] = tuple(parts) if parts[0] in SECTION_NAMES else ("config", *parts)
    if grid_value is not None:
        path = ("grid_search", "grid", key)
        listed = config.grid_search.grid.get(key)
        if isinstance(listed, tuple) and len(listed) > 1:
            path = (*path, listed.index(grid_value))
    fault = source.fault(path, "", "")
    return fault.source, fault.line, fault.path


def _torchvision_names(error: Exception) -> list[str]:
    """Return torchvision's models where it was torchvision that refused the name."""
    torchvision = sys.modules.get("torchvision")
    frames = _frames(error)
    if torchvision is None or not frames or f"{os.sep}torchvision{os.sep}" not in frames[-1].filename:
        return []
    names: list[str] = torchvision.models.list_models()
    return names


def _where(error: Exception) -> str:
    frames = _frames(error)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _frames(error: Exception) -> list[inspect.FrameInfo]:
    return inspect.getinnerframes(error.__traceback__) if error.__traceback__ is not None else []
