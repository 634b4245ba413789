"""What a study leaves open: batch sizes not measured, or with too few seeds, and how to measure them."""

from __future__ import annotations

import copy
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune_easytrain.document import Block, Code, Heading, Paragraph
from tune_easytrain.study import SEED_KEY, Arm, Study
from tune_easytrain.study_plans import unmeasured
from tune_easytrain.study_statistics import FEWEST_SEEDS
from tune_easytrain.trial_space import BATCH_SIZE_KEY, EFFECTIVE_BATCH_SIZE_KEY, value_at

_SEEDS_TO_ADD = 3
_LONGEST_ERROR = 160
_MISSING = object()
_NEED_SEVERAL_TRIALS = ("pbt", "pb2", "bohb")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run was begun, so that another one can be begun like it.

    Attributes:
        sweep_file: the file to begin with.
        is_quick: whether `--quick` belongs to it.
        overrides: what `--set` puts in place.
        is_from_python: whether its task was given in Python, so that no command can run it.
        note: why it is not the file that the run was begun with; empty where it is.
    """

    sweep_file: str
    is_quick: bool = False
    overrides: Sequence[str] = ()
    is_from_python: bool = False
    note: str = ""

    def command(self, changes: Mapping[str, Any]) -> str:
        """Return the command of the same run with other values of some keys, which come last and so hold."""
        kept = [text for text in self.overrides if text.partition("=")[0].strip() not in changes]
        overrides = [*kept, *(f"{key}={_yaml(value)}" for key, value in changes.items())]
        if self.is_from_python:
            quick = ["    quick=True,"] if self.is_quick else []
            listed = [f"        {text!r}," for text in overrides]
            start = ["te.run(", f"    {self.sweep_file!r},", "    build_task,", *quick, "    overrides=["]
            return "\n".join([*start, *listed, "    ],", ")"])
        first = f"tune-easytrain run {shlex.quote(self.sweep_file)}{' --quick' if self.is_quick else ''}"
        return " \\\n  ".join([first, *(f"--set {shlex.quote(text)}" for text in overrides)])


def describe_unknown(study: Study, recipes: Sequence[Recipe]) -> Iterator[Block]:
    """Yield what the study does not tell, each with the command that would measure it.

    Args:
        study: what was measured.
        recipes: how each run was begun, in their order; none: no such command is told.
    """
    yield Heading("What is not known", 2)
    for note in dict.fromkeys(recipe.note for recipe in recipes if recipe.note):
        yield Paragraph(note)
    entries = list(_entries(study, recipes))
    if not entries:
        yield Paragraph(
            "Every batch size of the sweep was measured with several seeds. Outside of them nothing is known."
        )
    for sentence, command in entries:
        yield Paragraph(sentence)
        if command:
            yield Code(command)
    largest = max((arm.effective_batch_size or 0 for arm in study.arms), default=0)
    if largest:
        arms = [arm for arm in study.arms if arm.effective_batch_size == largest]
        yield from _beyond(study, recipes, next((arm for arm in arms if arm.values), arms[0]), largest)


def _beyond(study: Study, recipes: Sequence[Recipe], arm: Arm, largest: int) -> Iterator[Block]:
    """Yield what measures twice the largest batch size, beside an arm that is known to run."""
    asked = value_at(arm.config, EFFECTIVE_BATCH_SIZE_KEY) or value_at(arm.config, BATCH_SIZE_KEY)
    if isinstance(asked, int) and asked > largest:
        yield Paragraph(f"E = {largest} is the whole training set: there is no larger batch.")
        return
    said = f"Beyond E = {largest} nothing was measured."
    if not recipes:
        yield Paragraph(said)
        return
    which = f" ({arm.setting_name})" if arm.setting else ""
    yield Paragraph(f"{said} To measure E = {2 * largest}{which}:")
    yield Code(command_for(study, recipes[arm.run_number], arm, size=2 * largest))


def _entries(study: Study, recipes: Sequence[Recipe]) -> Iterator[tuple[str, str]]:
    """Yield what is not known of each arm, with the command that tells; empty: none is known."""

    def command(arm: Arm, num_seeds: int = 0) -> str:
        return command_for(study, recipes[arm.run_number], arm, num_seeds=num_seeds) if recipes else ""

    for arm in unmeasured(study):
        if arm.unfinished_runs:
            places = [study.places[number] for number in dict.fromkeys(arm.unfinished_runs)]
            resume = "\n".join(f"tune-easytrain resume {shlex.quote(place)}" for place in places)
            yield f"{arm.name}: no trial has ended yet.", resume
        elif arm.failures:
            error = next(iter(arm.failures.values()))[:_LONGEST_ERROR]
            yield f"{arm.name}: every trial failed: {error}", command(arm)
        else:
            yield f"{arm.name}: no trial reported {study.metric}.", command(arm)
    for arm in study.measured:
        if len(arm.values) < FEWEST_SEEDS:
            yield f"{arm.name}: one seed; its spread is not known.", command(arm, _SEEDS_TO_ADD)


def command_for(
    study: Study, recipe: Recipe, arm: Arm, *, size: int | None = None, num_seeds: int = 0
) -> str:
    """Return the command that measures an arm, or its like with another batch size, or with more seeds.

    Every grid key gets the one value that the arm has, and the seeds stand by themselves, so that nothing is
    left to pair, draw or search.

    Args:
        study: what was measured.
        recipe: that of the arm's run.
        arm: what is to be measured.
        size: the effective batch size in place of the arm's.
        num_seeds: how many new seeds are trained in place of the arm's own.
    """
    sweep = study.sweeps[arm.run_number]
    grid = sweep["grid_search"]["grid"]
    config = copy.deepcopy(dict(arm.config))
    seeds = list(arm.seeds)
    if num_seeds:
        first = max((seed for other in study.arms for seed in other.seeds), default=0) + 1
        seeds = list(range(first, first + num_seeds))
    size_key = BATCH_SIZE_KEY
    if value_at(config, EFFECTIVE_BATCH_SIZE_KEY) is not None:
        size_key = EFFECTIVE_BATCH_SIZE_KEY
    if size is not None:
        _put(config, size_key, size)
    found = {key: value_at(config, key, _MISSING) for key in grid}
    values = {key: [value] for key, value in found.items() if value is not _MISSING}
    if size is not None and not any(key == size_key or size_key.startswith(f"{key}.") for key in grid):
        values[size_key] = [size]
    if seeds and (num_seeds or SEED_KEY in grid or len(seeds) > 1):
        values[SEED_KEY] = seeds
    changes: dict[str, Any] = {
        f"grid_search.grid.{key}": value for key, value in values.items() if grid.get(key) != value
    }
    return recipe.command(changes | _without_search(sweep, config))


def _without_search(sweep: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be set so that a sweep of which one config is left runs it once."""
    run, changes = sweep["run"], dict[str, Any]()
    if isinstance(sweep["grid_search"].get("pair"), list):
        changes["grid_search.pair"] = "none"
    if run.get("search", "random") != "random":
        changes["run.search"] = "random"
    if run.get("num_samples", 1) != 1:
        changes["run.num_samples"] = 1
    scheduler = run.get("scheduler") or {}
    never_stops = (scheduler.get("grace_period") or 0) > (value_at(config, "train.epochs") or math.inf)
    if scheduler.get("name") in _NEED_SEVERAL_TRIALS or never_stops:
        changes["run.scheduler"] = None
    return changes


def _yaml(value: Any) -> str:
    """Return a value as the text that `--set` reads it from; a plain word needs no quotes."""
    return value if value in ("none", "random") else json.dumps(value, ensure_ascii=False)


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config.setdefault(part, {})
    config[last] = value
