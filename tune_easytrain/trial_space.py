"""`TrialSpace`: what a Ray worker needs to turn one grid point into a trial's config. No pydantic, no Ray."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

POINT_KEY = "point"
"""The name under which Ray hands a trial its grid point; every other name Ray gives is a sampled key."""

MODEL_KEY = "model.type"
BATCH_SIZE_KEY = "hp.batch_size"
EFFECTIVE_BATCH_SIZE_KEY = "batch.effective_batch_size"

SECTION_NAMES = ("batch", "train", "memory")
"""The sections of a sweep file that a grid may override and that every trial's config holds."""


@dataclass(frozen=True)
class TrialSpace:
    """The part of a sweep that is the same for all trials; it is pickled to the workers.

    `keys` are the dotted grid keys in the order of a point's values, `constants` the user's `config`,
    `sections` the sweep's `batch`, `train` and `memory` as plain dicts. `numbered` holds, by the names under
    which Ray gives them, what a trial gets as a number: the place of its value among these.
    """

    keys: tuple[str, ...]
    constants: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]
    numbered: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def config(self, point: Sequence[Any], sampled: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the nested config of one trial; it shares no value with any other trial's.

        Args:
            point: One value per key. A list will do: Ray restores tuples as lists.
            sampled: Values drawn from distributions, by dotted key.

        Raises:
            ValueError: the point has not as many values as there are keys.
        """
        values = {**dict(zip(self.keys, point, strict=True)), **(sampled or {})}
        result: dict[str, Any] = copy.deepcopy({**self.constants, **self.sections})
        for key, value in values.items():
            _put(result, key.split("."), copy.deepcopy(value))
        _complete_budget(result.get("train", {}))
        return result

    def config_from_ray(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the nested config of the trial that Ray gave `params` (see `search_space.param_space`)."""
        values = {key: self._value(key, value) for key, value in params.items()}
        return self.config(values.pop(POINT_KEY), values)

    def point_from_ray(self, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the grid point of that trial."""
        point: Sequence[Any] = self._value(POINT_KEY, params[POINT_KEY])
        return point

    def _value(self, key: str, value: Any) -> Any:
        return self.numbered[key][int(value)] if key in self.numbered else value


def value_at(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return the value of a dotted key in a nested config, `default` where there is none.

    >>> value_at({"hp": {"batch_size": 8}}, "hp.batch_size")
    8
    """
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def _complete_budget(train: dict[str, Any]) -> None:
    """Make it one epoch where no budget is given; a sweep file gives at most one."""
    if all(train.get(key) is None for key in ("epochs", "num_samples", "num_steps")):
        train["epochs"] = 1


def _put(target: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    *parents, last = parts
    for part in parents:
        target = target.setdefault(part, {})
    if isinstance(value, dict) and isinstance(target.get(last), dict):
        for key, item in value.items():
            _put(target[last], [key], item)
    else:
        target[last] = value


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config by dotted keys; empty mappings stay values.

    >>> flatten_config({"hp": {"batch_size": 8}, "seed": 0})
    {'hp.batch_size': 8, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten_config(value, f"{name}.")
        else:
            flat[name] = value
    return flat
