"""The sweep file: strict, and refused with all its faults at once, each with its line."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from tune_easytrain import credentials
from tune_easytrain.config_checks import sweep_issues
from tune_easytrain.config_issues import Issue, fail, fail_with, issues_of, kind_of
from tune_easytrain.errors import ConfigError, Fault
from tune_easytrain.grid import GridSearchConfig, batch_size_issues, user_value_issues
from tune_easytrain.overrides import apply_overrides, apply_quick, is_key
from tune_easytrain.section import Section
from tune_easytrain.sections import (
    BatchConfig,
    FunctionName,
    MemoryConfig,
    RunConfig,
    TrainConfig,
    TrialConfig,
)
from tune_easytrain.trial_space import BATCH_SIZE_KEY
from tune_easytrain.yaml_source import YamlPath, YamlSource, read_data, read_file

__all__ = [
    "BatchConfig",
    "GridSearchConfig",
    "MemoryConfig",
    "RunConfig",
    "SweepConfig",
    "TrainConfig",
    "TrialConfig",
    "find_project_root",
    "load_config",
]

RESERVED_NAMES = ("batch", "train", "memory", "trial", "run")
"""Names that `config` may not hold at its top, because a trial's config has them for the sections."""

_SECRET = "holds a secret, and results and a cluster's log show what is in a sweep file"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


class SweepConfig(Section):
    """One sweep file, checked and complete. Build it with `load_config`, which makes every check."""

    name: str = "sweep"
    """Names the run directory; letters, digits, dots, underscores and dashes, at most 100."""

    task: FunctionName | None = None
    """What is trained, as `module:function` or `path/file.py:function`; None if Python gives it."""

    config: dict[str, Any] = Field(default_factory=dict)
    """The user's own constants, under every trial's values."""

    grid_search: GridSearchConfig = GridSearchConfig()
    """Which configs the trials have."""

    batch: BatchConfig = BatchConfig()
    """How a trial's effective batch size is reached in the memory it has."""

    train: TrainConfig = TrainConfig()
    """How a trial is trained."""

    memory: MemoryConfig = MemoryConfig()
    """What a trial gives up for memory."""

    trial: TrialConfig = TrialConfig()
    """Where one trial runs."""

    run: RunConfig = RunConfig()
    """How the sweep as a whole is run."""

    quick: dict[str, Any] = Field(default_factory=dict)
    """Values by dotted key that `--quick` puts in place of the file's, for a trial of the sweep itself."""

    _source_path: Path | None = PrivateAttr(default=None)
    _overrides: tuple[str, ...] = PrivateAttr(default=())
    _is_quick: bool = PrivateAttr(default=False)

    @property
    def source_path(self) -> Path | None:
        """The file this was loaded from; None for a config given as a Python dict."""
        return self._source_path

    @property
    def overrides(self) -> tuple[str, ...]:
        """The `key=value` strings that replaced or added values when it was loaded."""
        return self._overrides

    @property
    def is_quick(self) -> bool:
        """Whether the values of `quick` are in place."""
        return self._is_quick

    @property
    def project_root(self) -> Path:
        """The folder that relative paths in the file start from."""
        return Path.cwd() if self._source_path is None else find_project_root(self._source_path)

    @property
    def needs_task(self) -> bool:
        """Whether it says neither what to train nor how, so that Python has to give a `build_task`."""
        grid_functions = self.grid_search.grid.get("train.function")
        return self.task is None and self.train.own_function is None and grid_functions is None

    def resolved(self) -> dict[str, Any]:
        """Return everything, defaults included, as plain values that `load_config` reads as an equal config.

        Memory sizes are in bytes. The place of the file is not part of it, nor of equality.
        """
        plain = copy.deepcopy(self.model_dump(exclude={"grid_search", "run"}))
        plain["grid_search"] = copy.deepcopy(self.grid_search.resolved())
        plain["run"] = self.run.model_dump()
        if self.run.scheduler is not None:
            plain["run"]["scheduler"] = self.run.scheduler.resolved()
        plain["run"]["loggers"] = copy.deepcopy([logger.resolved() for logger in self.run.loggers])
        return {name: plain[name] for name in type(self).model_fields}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SweepConfig):
            return NotImplemented
        return self.resolved() == other.resolved()

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not _NAME.match(value):
            remedy = "use up to 100 letters, digits, '.', '_' and '-', the first a letter or digit"
            raise fail(f"{value!r} cannot name a run directory", remedy)
        return value

    @field_validator("quick")
    @classmethod
    def _dotted_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        remedy = "write a dotted key as --set takes it, such as train.epochs"
        issues = [Issue((key,), f"{key!r} is no key to set", remedy) for key in value if not is_key(key)]
        if issues:
            raise fail_with(issues)
        return value

    @field_validator("config", mode="before")
    @classmethod
    def _user_values(cls, value: Any) -> Any:
        if isinstance(value, dict) and (issues := _constant_issues(value)):
            raise fail_with(issues)
        return value


def load_config(
    path_or_dict: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), quick: bool = False
) -> SweepConfig:
    """Read and check a sweep file, or the same content as a dict.

    Args:
        path_or_dict: The file, or its content; a dict is copied.
        overrides: `key=value` strings that replace or add values, such as `train.epochs=3`.
        quick: put the values of the section `quick` in place first.

    Raises:
        ConfigError: with every fault of the file, in its order, then those of the overrides.
    """
    source, faults = read_data(path_or_dict) if isinstance(path_or_dict, Mapping) else read_file(path_or_dict)
    if source.data is None and faults:
        raise ConfigError(faults)
    quick_faults: list[Fault] = []
    if quick:
        source, quick_faults = apply_quick(source)
    source, override_faults = apply_overrides(source, overrides)
    config, issues = _check(source)
    faults = _in_order(source, faults, issues) + quick_faults + override_faults
    if faults or config is None:
        raise ConfigError(faults)
    config._overrides, config._is_quick = tuple(overrides), quick
    if not isinstance(path_or_dict, Mapping):
        config._source_path = Path(path_or_dict).absolute()
    return config


def find_project_root(path: str | Path) -> Path:
    """Return the nearest folder above a sweep file that holds pyproject.toml or .git, else the file's own."""
    folder = Path(path).absolute().parent
    for candidate in (folder, *folder.parents):
        if (candidate / "pyproject.toml").exists() or (candidate / ".git").exists():
            return candidate
    return folder


def _check(source: YamlSource) -> tuple[SweepConfig | None, list[Issue]]:
    """Return the config, or None together with everything wrong with it."""
    if not isinstance(source.data, dict):
        problem = f"the file is {kind_of(source.data)}, not a mapping"
        return None, [Issue((), problem, f"begin with {', '.join(SweepConfig.model_fields)}")]
    data = {key: value for key, value in source.data.items() if value is not None}
    if issues := [Issue(path, _SECRET, credentials.REMEDY) for path in credentials.secrets_in(data)]:
        return None, issues  # alone, as other faults show the values they are about
    issues = list(sweep_issues(data))
    config = None
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        issues += issues_of(error, SweepConfig)
    return (None if issues else config), issues


def _constant_issues(constants: dict[str, Any]) -> list[Issue]:
    issues = list(user_value_issues(constants))
    for name in RESERVED_NAMES:
        if name in constants:
            problem = f"the name {name!r} is taken: a trial's config holds the sweep's own {name} there"
            issues.append(Issue((name,), problem, "rename it, or move its keys to the section of that name"))
    parent, _, name = BATCH_SIZE_KEY.partition(".")
    group = constants.get(parent)
    if isinstance(group, dict) and name in group:
        issues += [issue._replace(path=(parent, name)) for issue in batch_size_issues(group[name])]
    return issues


def _in_order(source: YamlSource, faults: list[Fault], issues: list[Issue]) -> list[Fault]:
    """Return the faults of reading and those behind the issues, in the file's order, overrides last."""
    positions = _positions(source.data)
    unread = {fault.path for fault in faults}
    keyed = [((0, fault.line or 0, -1), fault) for fault in faults]
    for issue in issues:
        known = next(n for n in range(len(issue.path), -1, -1) if issue.path[:n] in positions)
        fault = source.fault(*issue)
        if fault.path in unread and _is_empty(source.data, issue.path):
            continue  # that it could not be read has been told
        is_override = int(fault.source != source.source)
        keyed.append(((is_override, fault.line or 0, positions[issue.path[:known]]), fault))
    return [fault for _, fault in sorted(keyed, key=lambda pair: pair[0])]


def _is_empty(data: Any, path: YamlPath) -> bool:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else data[part]
    return data is None


def _positions(data: Any) -> dict[YamlPath, int]:
    """Return how many values come before each value, by path."""
    result: dict[YamlPath, int] = {}

    def visit(value: Any, path: YamlPath) -> None:
        result[path] = len(result)
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, item in items:
            visit(item, (*path, key))

    visit(data, ())
    return result
