"""What has to fit together between `run` and the grid of a sweep file: draws, searches and schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tune_easytrain.config_issues import Issue
from tune_easytrain.trial_space import BATCH_SIZE_KEY
from tune_easytrain.yaml_source import YamlPath

_POPULATIONS = ("pbt", "pb2")
_NEEDS_ALL_TRIALS = ("hyperband", *_POPULATIONS)
_NEEDS_MAX_EPOCHS = ("hyperband", "bohb")
_PERTURBED = frozenset(("uniform", "loguniform"))


def run_issues(run: Mapping[str, Any], grid: Mapping[str, Any], max_epochs: int | None) -> Iterator[Issue]:
    """Yield the faults of the section `run` that show only beside the grid and the trials' budget.

    `max_epochs` is the most epochs of a trial, None where its budget is not in epochs.
    """
    search = run.get("search", "random")
    scheduler = run.get("scheduler")
    settings = scheduler if isinstance(scheduler, dict) else {"name": scheduler}
    name = settings.get("name")
    if search == "random":
        yield from _repeat_issues(run, grid)
    elif search in ("optuna", "bohb"):
        yield from _search_issues(search, run, grid)
    yield from _together_issues(search, name, run)
    yield from _epoch_issues(name, settings, max_epochs)
    if name in _POPULATIONS:
        yield from _population_issues(name, run, grid)


def _repeat_issues(run: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    num_samples = run.get("num_samples")
    has_distribution = any(isinstance(entry, dict) for entry in grid.values())
    if type(num_samples) is int and num_samples > 1 and not has_distribution:
        problem = f"{num_samples} samples of a grid without a distribution would repeat the same trials"
        yield Issue(("run", "num_samples"), problem, "remove it, or draw a grid key from a distribution")


def _search_issues(search: str, run: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    if run.get("num_samples") is None:
        problem = f"with search: {search} this is the number of trials in all, and it is not given"
        yield Issue(("run", "num_samples"), problem, "write num_samples: 20, say")
    if not any(_is_varied(entry) for entry in grid.values()):
        problem = f"{search} has nothing to search: no grid key has several values or a distribution"
        yield Issue(("run", "search"), problem, "remove it, or draw a grid key from a distribution")
    for key in grid:
        if "/" in key:
            problem = f"{key!r} has a slash in it, at which {search} would split it"
            yield Issue(("grid_search", "grid", key), problem, "rename it")


def _together_issues(search: Any, name: Any, run: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield the faults of a search, a scheduler and a number of trials at a time that do not go together."""
    if search == "bohb" and name != "bohb":
        yield Issue(("run", "search"), "bohb needs its own scheduler", "add scheduler: bohb")
    if name == "bohb" and search != "bohb":
        yield Issue(("run", "scheduler"), "bohb needs its own search", "add search: bohb, or take hyperband")
    if name in _POPULATIONS and search != "random":
        problem = f"{search} cannot choose the values that {name} changes"
        yield Issue(("run", "search"), problem, f"remove it, or the scheduler {name}")
    if name in _NEEDS_ALL_TRIALS and run.get("max_concurrent") is not None:
        problem = f"{name} compares trials that have all begun, and a limit makes the later ones wait"
        remedy = "remove it: trials take turns on the resources that there are"
        yield Issue(("run", "max_concurrent"), problem, remedy)


def _epoch_issues(name: Any, settings: Mapping[str, Any], max_epochs: int | None) -> Iterator[Issue]:
    path: YamlPath = ("run", "scheduler")
    if name in _NEEDS_MAX_EPOCHS and max_epochs is None:
        problem = f"{name} divides a trial's epochs into rungs, and the budget is not in epochs"
        yield Issue(path, problem, "write train: {epochs: 30}, or take asha")
    if max_epochs is None:
        return
    grace_period = settings.get("grace_period")
    if type(grace_period) is int and grace_period > max_epochs >= 1:
        than = f"more than the {max_epochs} epochs of a trial"
        problem = f"{grace_period} is {than}, so nothing would be stopped"
        yield Issue((*path, "grace_period"), problem, f"give at most {max_epochs}")
    interval = settings.get("perturbation_interval", 5)
    if name in _POPULATIONS and type(interval) is int and interval >= max_epochs:
        problem = f"{interval} epochs are not less than a trial's {max_epochs}, so nothing would be perturbed"
        remedy = f"give at most {max_epochs - 1}" if max_epochs > 1 else "train for more epochs"
        yield Issue((*path, "perturbation_interval"), problem, remedy)


def _population_issues(name: str, run: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield the faults of a grid whose trials are to take over each other's checkpoints and configs."""
    if not any(isinstance(entry, dict) and not _PERTURBED.isdisjoint(entry) for entry in grid.values()):
        remedy = "write hp.learning_rate: {loguniform: [1e-4, 1e-1]} under grid_search.grid"
        yield Issue(("run", "scheduler"), f"{name} has no grid key to perturb", remedy)
    has_several_points = any(isinstance(entry, list) and len(entry) > 1 for entry in grid.values())
    if run.get("num_samples") in (None, 1) and not has_several_points:
        yield Issue(("run", "num_samples"), f"{name} needs several trials, and there is one", "give 8, say")
    for key, entry in grid.items():
        if _is_varied(entry) and _is_fixed_while_training(key, entry):
            problem = f"{key!r} may not change while a trial trains, and {name} would change it"
            yield Issue(("grid_search", "grid", key), problem, "give one value, the same for all trials")
        if name == "pb2" and "/" in key:
            problem = f"{key!r} has a slash in it, at which pb2 would split it"
            yield Issue(("grid_search", "grid", key), problem, "rename it")


def _is_varied(entry: Any) -> bool:
    """Return whether a grid entry gives trials different values; a faulty one is told elsewhere."""
    if not isinstance(entry, dict):
        return isinstance(entry, list) and len(entry) > 1
    ((kind, args),) = entry.items() if len(entry) == 1 else ((None, None),)
    if kind == "choice":
        return isinstance(args, list) and len(args) > 1
    if kind == "randint" and isinstance(args, list) and [type(arg) for arg in args] == [int, int]:
        return bool(args[1] - args[0] > 1)
    return True


def _is_fixed_while_training(key: str, entry: Any) -> bool:
    """Return whether a checkpoint is of use for one value of a grid key only: the model, a step's samples."""
    first = key.partition(".")[0]
    if first in ("model", "batch") or key == BATCH_SIZE_KEY:
        return True
    parent, _, name = BATCH_SIZE_KEY.partition(".")
    values = entry.get("choice") if isinstance(entry, dict) else entry
    return key == parent and any(isinstance(value, dict) and name in value for value in values or [])
