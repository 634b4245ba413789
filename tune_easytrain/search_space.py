"""A sweep's trials: pair groups × grid → points in the file's order; distributions → Ray domains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import BadInputError
from tune_easytrain.grid import Distribution, GridSearchConfig
from tune_easytrain.trial_space import BATCH_SIZE_KEY, MODEL_KEY, POINT_KEY, SECTION_NAMES, TrialSpace

MAX_POINTS = 1_000_000
"""Grid points that are listed; a few short lists can mean more than memory holds."""


@dataclass(frozen=True)
class PairingPlan:
    """Which grid keys advance together, and why.

    `groups` holds every listed key once, in the file's order by first key; a key that is paired with none
    is a group of one. `reason` is a sentence for people, `warning` says what may not be as it was meant.
    """

    groups: tuple[tuple[str, ...], ...]
    mode: Literal["paired", "explicit", "cartesian", "single"]
    reason: str
    warning: str | None = None


def choose_pairing(grid_search: GridSearchConfig) -> PairingPlan:
    """Return which keys of a grid are paired.

    With `pair: auto`, `model.type` and `hp.batch_size` are paired one to one if both have more than one
    value and equally many; all else is crossed (the Cartesian product). A scalar is a list of one.
    """
    lengths = {key: len(values) for key, values in listed_values(grid_search).items()}
    if not isinstance(grid_search.pair, str):
        groups = _in_file_order(lengths, grid_search.pair)
        shown = "; ".join(" with ".join(group) for group in groups if len(group) > 1)
        return PairingPlan(groups, "explicit", f"grid_search.pair pairs {shown or 'nothing'}.")
    alone = _in_file_order(lengths, ())
    several = [key for key, length in lengths.items() if length > 1]
    if len(several) < 2:
        only = f"only {several[0]} has more than one value" if several else "no key has more than one value"
        return PairingPlan(alone, "single", f"There is nothing to pair: {only}.")
    if grid_search.pair == "none":
        return PairingPlan(alone, "cartesian", "All combinations are run, because grid_search.pair is none.")
    num_models, num_sizes = lengths.get(MODEL_KEY, 0), lengths.get(BATCH_SIZE_KEY, 0)
    if num_models > 1 and num_models == num_sizes:
        reason = (
            f"{MODEL_KEY} and {BATCH_SIZE_KEY} both have {num_models} values, so they are paired one to one."
        )
        return PairingPlan(_in_file_order(lengths, ((MODEL_KEY, BATCH_SIZE_KEY),)), "paired", reason)
    have = f"{MODEL_KEY} has {_count(num_models)} and {BATCH_SIZE_KEY} has {_count(num_sizes)}"
    warning = None
    if num_models > 1 and num_sizes > 1:
        warning = f"{have}: they are not paired, all {num_models * num_sizes} combinations are run."
    return PairingPlan(alone, "cartesian", f"All combinations are run, because {have}.", warning)


def _count(number: int) -> str:
    return f"{number or 'no'} value{'' if number == 1 else 's'}"


def _in_file_order(
    lengths: Mapping[str, int], pairs: tuple[tuple[str, ...], ...]
) -> tuple[tuple[str, ...], ...]:
    partners = {key: tuple(other for other in lengths if other in group) for group in pairs for key in group}
    return tuple(dict.fromkeys(partners.get(key, (key,)) for key in lengths))


def listed_values(grid_search: GridSearchConfig) -> dict[str, tuple[Any, ...]]:
    """Return the grid keys whose values are listed, in the file's order, with their values."""
    return {key: values for key, values in grid_search.grid.items() if not isinstance(values, Distribution)}


def distributions(grid_search: GridSearchConfig) -> dict[str, Distribution]:
    """Return the grid keys whose values are drawn, in the file's order, with their distributions."""
    return {key: values for key, values in grid_search.grid.items() if isinstance(values, Distribution)}


def perturbed_keys(config: SweepConfig) -> tuple[str, ...]:
    """Return the grid keys, drawn from ranges, whose values the scheduler changes while trials train."""
    if config.run.scheduler is None or config.run.scheduler.name not in ("pbt", "pb2"):
        return ()
    drawn = distributions(config.grid_search)
    return tuple(key for key in drawn if drawn[key].kind in ("uniform", "loguniform"))


def grid_keys(config: SweepConfig) -> tuple[str, ...]:
    """Return the dotted keys a grid point has values for, in the file's order."""
    return tuple(listed_values(config.grid_search))


def varied_keys(config: SweepConfig) -> tuple[str, ...]:
    """Return the dotted grid keys that tell the trials apart: several values, or drawn."""
    return tuple(
        key
        for key, values in config.grid_search.grid.items()
        if isinstance(values, Distribution) or len(values) > 1
    )


def grid_points(config: SweepConfig, max_experiments: int | None = None) -> list[tuple[Any, ...]]:
    """Return the points of the grid: one tuple per trial, its values in the order of `grid_keys`.

    The file's first key varies slowest, as in nested loops; a pair group stands at the place of its first
    key. A grid without listed values has one point, `()`. Where the points are chosen, all of them stay.

    Raises:
        BadInputError: `max_experiments`, the number of points to keep, is not an integer of at least 1, or
            more than `MAX_POINTS` would be kept.
    """
    _check_cut(max_experiments)
    kept = None if is_chosen(config) else max_experiments
    number = num_grid_points(config)
    if min(number, kept or number) > MAX_POINTS:
        remedy = "shorten its lists" if is_chosen(config) else "shorten its lists, or use --max-experiments"
        raise BadInputError(
            f"the grid has {number:,} points, and no more than {MAX_POINTS:,} are listed; {remedy}"
        )
    return list(itertools.islice(_points(config), None if is_chosen(config) else max_experiments))


def _check_cut(max_experiments: int | None) -> None:
    if max_experiments is not None and (type(max_experiments) is not int or max_experiments < 1):
        raise BadInputError(f"max_experiments is {max_experiments!r}; give an integer of at least 1")


def _points(config: SweepConfig) -> Iterator[tuple[Any, ...]]:
    keys = grid_keys(config)
    for chosen in itertools.product(*_rows(config)):
        by_key = {key: value for row in chosen for key, value in row.items()}
        yield tuple(by_key[key] for key in keys)


def _rows(config: SweepConfig) -> list[list[dict[str, Any]]]:
    """Return the rows of every pair group, without those whose knob is below `batch.start_from`."""
    values, knob, kept = listed_values(config.grid_search), config.batch.knob, knob_values(config)
    rows = [
        [dict(zip(group, row, strict=True)) for row in zip(*(values[key] for key in group), strict=True)]
        for group in choose_pairing(config.grid_search).groups
    ]
    return [[row for row in group if knob not in row or row[knob] in kept] for group in rows]


def knob_values(config: SweepConfig) -> tuple[Any, ...]:
    """Return the listed values of `batch.knob` from `batch.start_from` on; none where none are listed."""
    listed = listed_values(config.grid_search).get(config.batch.knob or "", ())
    start_from = config.batch.start_from
    return tuple(value for value in listed if start_from is None or value >= start_from)


def num_grid_points(config: SweepConfig) -> int:
    """Return the number of points of the grid, without listing them."""
    return math.prod(map(len, _rows(config)))


def is_chosen(config: SweepConfig) -> bool:
    """Return whether a search algorithm chooses each trial's grid point, or all of them are run."""
    return config.run.search != "random"


def num_experiments(config: SweepConfig, max_experiments: int | None = None) -> int:
    """Return the number of grid points that are run; where they are chosen, the number of trials.

    Raises:
        BadInputError: `max_experiments`, the number to keep, is not an integer of at least 1.
    """
    _check_cut(max_experiments)
    number = config.run.num_samples if is_chosen(config) else num_grid_points(config)
    return number if max_experiments is None else min(number, max_experiments)


def num_repeats(config: SweepConfig) -> int:
    """Return how many trials there are of every grid point; 1 where the points are chosen."""
    return 1 if is_chosen(config) else config.run.num_samples


def num_trials(config: SweepConfig, max_experiments: int | None = None) -> int:
    """Return the number of trials.

    Every grid point is run once for each of `run.num_samples` draws; where the points are chosen, there are
    `run.num_samples` trials in all.

    Raises:
        BadInputError: as `num_experiments`.
    """
    return num_experiments(config, max_experiments) * num_repeats(config)


def build_trial_space(config: SweepConfig) -> TrialSpace:
    """Return what a worker needs to build a trial's config; it can be pickled and needs no pydantic."""
    resolved = config.resolved()
    sections = {name: resolved[name] for name in SECTION_NAMES}
    return TrialSpace(grid_keys(config), resolved["config"], sections, _numbered(config))


def _numbered(config: SweepConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values that Ray is to know by their numbers alone: a model of results takes only numbers."""
    if not is_chosen(config):
        return {}
    choices = {key: d.args for key, d in distributions(config.grid_search).items() if d.kind == "choice"}
    return {POINT_KEY: tuple(grid_points(config)), **choices}


def trial_config(
    config: SweepConfig, point: tuple[Any, ...] | list[Any], sampled: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the nested config of one trial from its grid point and the values drawn for it."""
    return build_trial_space(config).config(point, sampled)


def expand_trials(config: SweepConfig) -> list[dict[str, Any]]:
    """Return the nested config of every grid point, in the file's order.

    Constants lie under the trial's own values; the complete `batch` and `train` sections are in it under
    those names. A key that is drawn from a distribution is absent, unless there is a constant below it:
    each point stands for `run.num_samples` trials (see `num_trials`). No two configs share a value.
    """
    space = build_trial_space(config)
    return [space.config(point) for point in grid_points(config)]


def known_configs(config: SweepConfig, max_experiments: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield for every trial what is known of its nested config before it starts, in the trials' order.

    Drawn keys are absent, and so are listed ones of several values where the grid point is chosen.
    """
    space = build_trial_space(config)
    if is_chosen(config):
        listed = listed_values(config.grid_search)
        given = {key: values[0] for key, values in listed.items() if len(values) == 1}
        space, points = replace(space, keys=tuple(given)), [tuple(given.values())]
    else:
        points = grid_points(config, max_experiments)
    for index in range(num_trials(config, max_experiments)):
        yield space.config(points[index % len(points)])


def param_space(config: SweepConfig, *, max_experiments: int | None = None) -> dict[str, Any]:
    """Return Ray Tune's parameter space: the grid as one dimension of whole points, and the drawn keys.

    Ray draws from it `num_draws` times. A search over whole points keeps the file's order, which Ray would
    change, and lets it be cut short: only the first `max_experiments` points are kept. Where points are
    chosen, all of them stay, each known by its number. `TrialSpace.config_from_ray` reads what Ray then
    gives a trial.
    """
    from ray import tune

    numbered = _numbered(config)
    if is_chosen(config):
        space: dict[str, Any] = {POINT_KEY: _domain(Distribution("choice", numbered[POINT_KEY]), True)}
    else:
        space = {POINT_KEY: tune.grid_search(grid_points(config, max_experiments))}
    for key, distribution in distributions(config.grid_search).items():
        space[key] = _domain(distribution, key in numbered)
    return space


def num_draws(config: SweepConfig, max_experiments: int | None = None) -> int:
    """Return how often Ray is to draw from `param_space`; a grid search in it multiplies the trials."""
    return num_experiments(config, max_experiments) if is_chosen(config) else config.run.num_samples


def _domain(distribution: Distribution, is_numbered: bool) -> Any:
    """Return Ray's domain of a distribution, or of the numbers of its values; what cannot vary is a value."""
    from ray import tune

    kind, args = distribution.kind, distribution.args
    if kind == "choice":
        values = list(range(len(args))) if is_numbered else list(args)
        return tune.choice(values) if len(values) > 1 else values[0]
    if kind == "randint":
        return tune.randint(*args) if args[1] - args[0] > 1 else args[0]
    return tune.uniform(*args) if kind == "uniform" else tune.loguniform(*args)
