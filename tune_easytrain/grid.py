"""The `grid_search` section: value lists, distributions, and which keys advance together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import Field, ValidationError, field_validator

from tune_easytrain.config_issues import (
    Issue,
    describe,
    fail,
    fail_with,
    integer_remedy,
    issues_of,
    kind_of,
    show_value,
)
from tune_easytrain.errors import did_you_mean
from tune_easytrain.section import Section
from tune_easytrain.sections import BatchConfig, MemoryConfig, TrainConfig
from tune_easytrain.trial_space import BATCH_SIZE_KEY, POINT_KEY

_SECTIONS: Mapping[str, type[Section]] = {
    "batch": BatchConfig,
    "train": TrainConfig,
    "memory": MemoryConfig,
}
_NOT_PER_TRIAL = {
    "trial": "every trial gets the same resources",
    "run": "it is about the sweep as a whole",
    "config": "grid keys are already relative to config",
}
_NAMES_OF_RAY = ("grid_search", "eval")


DistributionKind: TypeAlias = Literal["choice", "uniform", "loguniform", "randint"]


@dataclass(frozen=True)
class Distribution:
    """Values that are drawn, not listed.

    `args` are the choices of `choice`, else the two bounds: both floats for `uniform` and `loguniform`
    (0 < low < high), both integers for `randint`, whose upper bound is never drawn.
    """

    kind: DistributionKind
    args: tuple[Any, ...]

    def listed(self) -> tuple[Any, ...]:
        """Return the values whose validity decides that of all: every choice, or both ends of the range."""
        return (self.args[0], self.args[1] - 1) if self.kind == "randint" else self.args


GridValues: TypeAlias = tuple[Any, ...] | Distribution
"""What a grid key holds: the values it takes in turn, or what they are drawn from."""


class GridSearchConfig(Section):
    """Which configs the trials have."""

    grid: dict[str, GridValues] = Field(default_factory=dict)
    """Values by dotted key, in the file's order; relative to `config`, or `batch.` and `train.` fields."""

    pair: Literal["auto", "none"] | tuple[tuple[str, ...], ...] = "auto"
    """Keys that advance together: by rule, never, or as listed."""

    @field_validator("grid", mode="before")
    @classmethod
    def _parse_grid(cls, value: Any) -> dict[str, GridValues]:
        grid, issues = parse_grid(value)
        if issues:
            raise fail_with(issues)
        return grid

    @field_validator("pair", mode="before")
    @classmethod
    def _parse_pair(cls, value: Any) -> Any:
        if isinstance(value, str) and value in ("auto", "none"):
            return value
        if not isinstance(value, (list, tuple)):
            raise fail(f"{show_value(value)} is not allowed", "write auto, none, or [[key, key], ...]")
        issues = [
            Issue((index,), f"{show_value(group)} is not a list of keys", "write [key, key]")
            for index, group in enumerate(value)
            if not isinstance(group, (list, tuple)) or not all(isinstance(key, str) for key in group)
        ]
        if issues:
            raise fail_with(issues)
        return tuple(tuple(group) for group in value)

    def resolved(self) -> dict[str, Any]:
        """Return the section as plain values that load to an equal one."""
        grid: dict[str, Any] = {}
        for key, values in self.grid.items():
            if isinstance(values, Distribution):
                grid[key] = {values.kind: list(values.args)}
            else:
                grid[key] = list(values)
        pair = self.pair if isinstance(self.pair, str) else [list(group) for group in self.pair]
        return {"grid": grid, "pair": pair}


def parse_grid(raw: Any) -> tuple[dict[str, GridValues], list[Issue]]:
    """Return the grid as far as it is valid, with everything wrong with it; paths start at the grid."""
    if not isinstance(raw, dict):
        remedy = "write 'key: [value, value]' lines below it"
        return {}, [Issue((), f"is {kind_of(raw)}, not a mapping", remedy)]
    grid: dict[str, GridValues] = {}
    issues: list[Issue] = []
    for key, entry in raw.items():
        values, found = _parse_entry(key, entry)
        found = [*_key_issues(key, raw), *found]
        if not found and values is not None:
            values, found = _checked_values(key, values, listed=isinstance(entry, list))
        issues += [issue._replace(path=(key, *issue.path)) for issue in found]
        if values is not None and not found:
            grid[key] = values
    return grid, issues


def user_value_issues(value: Any) -> Iterator[Issue]:
    """Yield what makes a user's own value unusable: keys that Ray executes, dotted keys, nan."""
    if isinstance(value, float) and math.isnan(value):
        yield Issue((), "nan equals nothing, not even itself", "give a number, or null")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str):
            yield from (Issue((key,), *words) for words in _name_issues(key))
        yield from (issue._replace(path=(key, *issue.path)) for issue in user_value_issues(item))


def batch_size_issues(value: Any) -> Iterator[Issue]:
    """Yield what is wrong with one value of `hp.batch_size`, an integer of at least 1."""
    if type(value) is not int:
        problem = f"is {kind_of(value)}, not an integer" if value is not None else "is empty (null)"
        shown = "" if value is None else show_value(value) + " "
        yield Issue((), shown + problem, integer_remedy(value, "an integer of at least 1"))
    elif value < 1:
        yield Issue((), f"{value} is not at least 1", "give an integer of at least 1")


def _name_issues(key: str) -> Iterator[tuple[str, str]]:
    if key in _NAMES_OF_RAY:
        yield f"the key {key!r} is not allowed: Ray would execute what it holds", "rename it"
    if not key:
        yield "a key is empty", "give it a name"
    elif "." in key:
        parent, _, rest = key.partition(".")
        yield f"the key {key!r} has a dot in it", f"write {parent}: {{{rest}: ...}}"


def _key_issues(key: str, raw: Mapping[str, Any]) -> Iterator[Issue]:
    first, *rest = parts = key.split(".")
    for name in _NAMES_OF_RAY:
        if name in parts:
            yield Issue((), f"the name {name!r} is not allowed in a key: Ray would execute it", "rename it")
    if not all(parts):
        yield Issue((), f"the key {key!r} has an empty part", "put one dot between two names")
    elif first in _SECTIONS:
        fields = [f"{first}.{name}" for name in _SECTIONS[first].model_fields]
        if not rest:
            remedy = f"name one field, such as {fields[0]}"
            yield Issue((), f"the section {key!r} cannot be a grid key", remedy)
        elif key not in fields:
            yield Issue((), f"unknown key {key!r}", did_you_mean(key, fields))
    elif first in _NOT_PER_TRIAL and (rest or first != "config"):
        remedy = f"write {'.'.join(rest)}" if first == "config" else "remove it from the grid"
        yield Issue((), f"{key!r} cannot differ between trials: {_NOT_PER_TRIAL[first]}", remedy)
    for other in raw:
        if other.startswith(key + "."):
            yield Issue((), f"{key!r} holds {other!r}, which is a grid key too", "keep one of the two")


def _parse_entry(key: str, entry: Any) -> tuple[GridValues | None, list[Issue]]:
    if isinstance(entry, dict):
        return _parse_distribution(key, entry)
    if entry is None:
        return None, [Issue((), "is empty (null)", "give a list of values; [null] is one null value")]
    values = entry if isinstance(entry, list) else [entry]
    if not values:
        return None, [Issue((), "[] is an empty list", "give at least one value, or remove the key")]
    issues = list(user_value_issues(values))
    return (None if issues else tuple(values)), issues


def _parse_distribution(key: str, entry: dict[str, Any]) -> tuple[Distribution | None, list[Issue]]:
    if len(entry) != 1:
        remedy = "write {uniform: [low, high]} for a distribution, or [{...}] for a mapping as a value"
        return None, [Issue((), f"{show_value(entry)} is a mapping, not a list of values", remedy)]
    kind: Any
    ((kind, args),) = entry.items()
    if kind not in _ARGUMENT_RULES:
        remedy = f"{did_you_mean(kind, _ARGUMENT_RULES)} (a mapping as a value goes into a list: [{{...}}])"
        return None, [Issue((kind,), f"{kind!r} is no distribution", remedy)]
    if key == POINT_KEY:
        return None, [Issue((), f"the name {POINT_KEY!r} is taken for a drawn key", "rename it")]
    if not isinstance(args, list):
        remedy = f"write {{{kind}: [{'value, value' if kind == 'choice' else 'low, high'}]}}"
        return None, [Issue((kind,), f"{show_value(args)} is {kind_of(args)}, not a list", remedy)]
    problem, remedy = _ARGUMENT_RULES[kind](args)
    issues = [Issue((), problem, remedy)] if problem else []
    issues += user_value_issues(args) if kind == "choice" else []
    if issues:
        return None, [issue._replace(path=(kind, *issue.path)) for issue in issues]
    numbers = kind in ("uniform", "loguniform")
    return Distribution(kind, tuple(map(float, args)) if numbers else tuple(args)), []


def _choice_fault(args: list[Any]) -> tuple[str, str]:
    return ("", "") if args else ("[] is an empty list", "give at least one value")


def _range_fault(args: list[Any], *, integers: bool = False, positive: bool = False) -> tuple[str, str]:
    shown = show_value(args)
    wanted = f"write two {'integers' if integers else 'numbers'}, the smaller first"
    wanted += ", both above 0" if positive else ""
    kinds = (int,) if integers else (int, float)
    if len(args) != 2 or not all(type(value) in kinds and math.isfinite(value) for value in args):
        return f"{shown} is not a range", wanted
    if args[0] >= args[1]:
        return f"{shown} is an empty range", wanted
    return (f"{shown} is not above 0", wanted) if positive and args[0] <= 0 else ("", "")


_ARGUMENT_RULES: dict[Any, Callable[[list[Any]], tuple[str, str]]] = {
    "choice": _choice_fault,
    "uniform": _range_fault,
    "loguniform": lambda args: _range_fault(args, positive=True),
    "randint": lambda args: _range_fault(args, integers=True),
}


def _checked_values(key: str, values: GridValues, *, listed: bool) -> tuple[GridValues, list[Issue]]:
    """Check the values of a key that has rules, and return them as those rules read them."""
    if isinstance(values, Distribution):
        allowed = _allowed_by_rule(key)
        if values.kind in ("uniform", "loguniform") and not allowed.startswith("a number"):
            problem = f"{values.kind} draws fractions, {key} needs {allowed}"
            return values, [Issue((values.kind,), problem, "use randint or choice")] if allowed else []
        checked, issues = _checked_all(key, values.listed())
        issues = [issue._replace(path=(values.kind, *issue.path)) for issue in issues]
        return (Distribution("choice", checked) if values.kind == "choice" else values), issues
    checked, issues = _checked_all(key, values)
    return checked, issues if listed else [issue._replace(path=issue.path[1:]) for issue in issues]


def _allowed_by_rule(key: str) -> str:
    """Return in words what a key with rules allows; empty for the user's own keys."""
    first, _, name = key.partition(".")
    if first in _SECTIONS:
        return describe(_SECTIONS[first].model_fields[name])
    return "an integer of at least 1" if key == BATCH_SIZE_KEY else ""


def _checked_all(key: str, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Issue]]:
    checked: list[Any] = []
    issues: list[Issue] = []
    for index, value in enumerate(values):
        read, found = _checked_value(key, value)
        checked.append(read)
        issues += [issue._replace(path=(index, *issue.path)) for issue in found]
    return tuple(checked), issues


def _checked_value(key: str, value: Any) -> tuple[Any, list[Issue]]:
    first, _, name = key.partition(".")
    parent, _, last = BATCH_SIZE_KEY.partition(".")
    if first in _SECTIONS:
        return _section_value(_SECTIONS[first], name, value)
    if key == BATCH_SIZE_KEY:
        return value, list(batch_size_issues(value))
    if key == parent and isinstance(value, dict) and last in value:
        return value, [issue._replace(path=(last,)) for issue in batch_size_issues(value[last])]
    return value, []


def _section_value(section: type[Section], name: str, value: Any) -> tuple[Any, list[Issue]]:
    try:
        read = getattr(section.model_validate({name: value}), name)
    except ValidationError as error:
        return value, [issue._replace(path=issue.path[1:]) for issue in issues_of(error, section)]
    return read, []
