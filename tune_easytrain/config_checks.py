"""What has to fit together between the sections of a sweep file, whatever each section says by itself.

The checks read the file's plain data, so that they find their faults even where a section has others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tune_easytrain.config_issues import Issue
from tune_easytrain.errors import did_you_mean
from tune_easytrain.run_checks import run_issues
from tune_easytrain.settings import EVALUATE_ONLY, is_knob_value
from tune_easytrain.trial_space import BATCH_SIZE_KEY, flatten_config
from tune_easytrain.yaml_source import YamlPath

_PAIR_PATH: YamlPath = ("grid_search", "pair")
_GRID_PATH: YamlPath = ("grid_search", "grid")


def sweep_issues(data: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield what does not fit together in the data of a sweep file."""
    grid = _mapping(_mapping(data, "grid_search"), "grid")
    yield from _pair_issues(_mapping(data, "grid_search").get("pair"), grid)
    yield from _constant_issues(_mapping(data, "config"), grid)
    yield from _batch_size_issues(data, grid)
    yield from _probe_issues(data, grid)
    yield from _knob_issues(data, grid)
    yield from _budget_issues(data, grid)
    yield from _rate_issues(data, grid)
    yield from _precision_issues(data, grid)
    yield from _model_issues(data, grid)
    yield from run_issues(_mapping(data, "run"), grid, _max_epochs(data, grid))


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _pair_issues(pair: Any, grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield the faults of explicit pair groups: keys, kinds and lengths."""
    seen: dict[str, int] = {}
    for number, group in enumerate(pair if isinstance(pair, list) else []):
        if not isinstance(group, list) or not all(isinstance(key, str) for key in group):
            continue
        if len(group) < 2:
            yield Issue((*_PAIR_PATH, number), f"{group} is a group of {len(group)}", "name two keys or more")
        for place, key in enumerate(group):
            path = (*_PAIR_PATH, number, place)
            if key not in grid:
                yield Issue(path, f"{key!r} is not in the grid", did_you_mean(key, grid))
            elif isinstance(grid[key], dict):
                problem = f"{key!r} is a distribution, which has no length to pair by"
                yield Issue(path, problem, "take it out of the group")
            if key in seen:
                where = "twice in this group" if seen[key] == number else f"in group {seen[key]} too"
                yield Issue(path, f"{key!r} is {where}", "keep it in one place")
            seen.setdefault(key, number)
        lengths = {key: _length(grid[key]) for key in group if key in grid and _length(grid[key])}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            problem = f"paired keys must be equally long: {shown}"
            yield Issue((*_PAIR_PATH, number), problem, "give each the same number of values")


def _length(entry: Any) -> int:
    """Return how many values a grid entry lists; 0 for a distribution or an entry that has none."""
    if isinstance(entry, list):
        return len(entry)
    return 0 if isinstance(entry, dict) else 1


def _constant_issues(constants: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield the grid keys that lead through a constant which is not a mapping."""
    for key in grid:
        found: Any = constants
        parts = key.split(".")
        for depth, part in enumerate(parts[:-1], start=1):
            if part not in found:
                break
            found = found[part]
            if not isinstance(found, dict):
                parent = ".".join(parts[:depth])
                problem = f"{key!r} leads into config.{parent}, which is {found!r:.80} and not a mapping"
                yield Issue((*_GRID_PATH, key), problem, f"remove config.{parent}, or rename the grid key")
                break


def _batch_size_issues(data: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield a fault if some trial would have no batch size, though it needs one."""
    if None not in _values(data, grid, "batch", "effective_batch_size") or _every_trial_has_own(data, grid):
        return
    probe_is_off = all(value == "off" for value in _values(data, grid, "batch", "probe"))
    functions = _values(data, grid, "train", "function")
    if (probe_is_off and None not in functions) or functions == [EVALUATE_ONLY]:
        return
    problem = f"no batch size: neither batch.effective_batch_size nor {BATCH_SIZE_KEY} is given"
    remedy = (
        "write batch: {effective_batch_size: 128}, the same for all trials, or list "
        f"{BATCH_SIZE_KEY}: [...] under grid_search.grid"
    )
    yield Issue(("batch", "effective_batch_size"), problem, remedy)


def _every_trial_has_own(data: Mapping[str, Any], grid: Mapping[str, Any]) -> bool:
    """Tell whether every trial has an `hp.batch_size`, be it a constant or in the grid."""
    parent, _, name = BATCH_SIZE_KEY.partition(".")
    if BATCH_SIZE_KEY in grid or name in _mapping(_mapping(data, "config"), parent):
        return True
    entry = grid.get(parent)
    if isinstance(entry, dict):
        entry = entry.get("choice")
    return isinstance(entry, list) and all(isinstance(item, dict) and name in item for item in entry)


def _probe_issues(data: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield a fault if there is a training function, no task, and yet something is to be probed."""
    if data.get("task") is not None:
        return
    functions = _own_functions(data, grid)
    if functions and any(value == "auto" for value in _values(data, grid, "batch", "probe")):
        problem = f"there is nothing to probe: train.function is {functions[0]!r} and there is no task"
        yield Issue(("batch", "probe"), problem, "write batch: {probe: off}, or name a task")


def _knob_issues(data: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield the faults of `batch.knob` and `batch.start_from`: keys that do not fit, and values."""
    for name in ("knob", "start_from"):
        if f"batch.{name}" in grid:
            problem = f"batch.{name} is one for the whole sweep"
            yield Issue((*_GRID_PATH, f"batch.{name}"), problem, "move it to the section batch")
    knob, start_from = (_mapping(data, "batch").get(name) for name in ("knob", "start_from"))
    if knob is None and start_from is not None:
        remedy = "name the key that it is a value of, such as knob: model.max_crops"
        yield Issue(("batch", "start_from"), f"{start_from!r} is a value of no knob", remedy)
    if not isinstance(knob, str) or not all(knob.split(".")):  # told elsewhere
        return
    constants = flatten_config(_mapping(data, "config"))
    is_nested = any(knob.startswith(f"{key}.") for key in grid)
    if knob not in grid and knob not in constants and not is_nested:
        names = {key: value for key, value in constants.items() if is_knob_value(value)}
        problem = f"{knob!r} is neither in the grid nor in config"
        yield Issue(("batch", "knob"), problem, did_you_mean(knob, [*grid, *names]))
        return
    values = _listed(grid.get(knob, constants.get(knob)))
    wrong = [value for value in values if not is_knob_value(value)]
    if wrong:
        problem = f"{wrong[0]!r} is a value of the knob {knob}, and no number above 0"
        yield Issue((*_GRID_PATH, knob) if knob in grid else ("config",), problem, "give numbers only")
    elif is_knob_value(start_from) and not any(value >= start_from for value in values):
        largest = f"the largest is {max(values)}" if values else f"{knob} has no list of values in the grid"
        problem = f"no value of {knob} is {start_from} or more: {largest}"
        yield Issue(("batch", "start_from"), problem, "give a smaller one, or remove it")


def _listed(entry: Any) -> list[Any]:
    """Return the values that a grid entry or a constant lists; none for a distribution or a mapping."""
    if isinstance(entry, list):
        return entry
    return [] if entry is None or isinstance(entry, dict) else [entry]


def _own_functions(data: Mapping[str, Any], grid: Mapping[str, Any]) -> list[Any]:
    """Return the user's own training functions that the sweep names."""
    named = _values(data, grid, "train", "function")
    return [value for value in named if value not in (None, EVALUATE_ONLY)]


def _budget_issues(data: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield a fault if a trial would be told in two ways how much it is to train."""
    given = {name: values[0] for name in _BUDGETS if (values := _integers(data, grid, "train", name))}
    if len(given) > 1:
        shown = " and ".join(f"train.{name} ({value})" for name, value in given.items())
        remedy = f"keep one of {', '.join(given)}"
        yield Issue(_place(grid, "train", [*given][-1]), f"{shown} each say how much is trained", remedy)


def _rate_issues(data: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield a fault if learning rates are to be scaled from an unknown batch size, or never are."""
    scalings = _values(data, grid, "train", "lr_scaling")
    bases = _values(data, grid, "train", "base_batch_size")
    scaling = next((value for value in scalings if value in ("linear", "sqrt")), None)
    if scaling is not None and None in bases:
        problem = f"is required: train.lr_scaling is {scaling}"
        remedy = "give the effective batch size that the learning rate was chosen for"
        yield Issue(("train", "base_batch_size"), problem, remedy)
    if scalings in ([None], ["none"]) and bases != [None]:
        problem = f"{bases[0]} has no effect, for train.lr_scaling is none"
        remedy = "write lr_scaling: linear or sqrt, or remove it"
        yield Issue(_place(grid, "train", "base_batch_size"), problem, remedy)


def _precision_issues(data: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield a fault if the noise of scaled gradients would be measured."""
    if "fp16" in _values(data, grid, "train", "precision") and True in _values(
        data, grid, "train", "noise_scale"
    ):
        problem = "the noise scale cannot be measured with train.precision: fp16, whose gradients are scaled"
        yield Issue(_place(grid, "train", "noise_scale"), problem, "use bf16 or fp32, or remove it")


def _model_issues(data: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield a fault if what the built-in loop does to a model is asked of another, or cannot be combined."""
    shardings = [value for value in _values(data, grid, "memory", "sharding") if value not in (None, "none")]
    functions = _own_functions(data, grid)
    if shardings and functions:
        problem = f"{shardings[0]} is done by the built-in loop, and train.function is {functions[0]!r}"
        yield Issue(_place(grid, "memory", "sharding"), problem, "remove it, and shard in your function")
    if functions and True in _values(data, grid, "train", "compile"):
        problem = f"models are compiled by the built-in loop, and train.function is {functions[0]!r}"
        yield Issue(_place(grid, "train", "compile"), problem, "remove it, and compile in your function")
    if "full" not in shardings:
        return
    if True in _values(data, grid, "train", "compile"):
        problem = "what torch.compile makes of a model cannot be split by memory.sharding: full"
        yield Issue(_place(grid, "train", "compile"), problem, "remove it, or use sharding: optimizer")
    if "fp16" in _values(data, grid, "train", "precision"):
        problem = "the loss scale of train.precision: fp16 cannot be kept with memory.sharding: full"
        yield Issue(_place(grid, "train", "precision"), problem, "use bf16 or fp32, or sharding: optimizer")
    if True in _values(data, grid, "train", "noise_scale"):
        problem = "the noise scale cannot be measured with memory.sharding: full, whose gradients are split"
        yield Issue(_place(grid, "train", "noise_scale"), problem, "remove it, or use sharding: optimizer")


def _place(grid: Mapping[str, Any], section: str, name: str) -> YamlPath:
    """Return where a field of a section stands in the file: in the grid, or in the section."""
    key = f"{section}.{name}"
    return (*_GRID_PATH, key) if key in grid else (section, name)


def _max_epochs(data: Mapping[str, Any], grid: Mapping[str, Any]) -> int | None:
    """Return the most epochs of a trial; None where its budget is in samples or steps."""
    if _integers(data, grid, "train", "num_samples") or _integers(data, grid, "train", "num_steps"):
        return None
    return max(_integers(data, grid, "train", "epochs"), default=1)


_DEFAULTS: Mapping[tuple[str, str], Any] = {("batch", "probe"): "auto"}
_BUDGETS = ("epochs", "num_samples", "num_steps")


def _integers(data: Mapping[str, Any], grid: Mapping[str, Any], section: str, name: str) -> list[int]:
    return [value for value in _values(data, grid, section, name) if type(value) is int]


def _values(data: Mapping[str, Any], grid: Mapping[str, Any], section: str, name: str) -> list[Any]:
    """Return every value a field of a section takes in the sweep, whether listed or constant."""
    entry = grid.get(f"{section}.{name}")
    if isinstance(entry, dict):
        (args,) = entry.values() if len(entry) == 1 else ([],)
        return list(args) if isinstance(args, list) else []
    if entry is not None:
        return entry if isinstance(entry, list) else [entry]
    return [_mapping(data, section).get(name, _DEFAULTS.get((section, name)))]
