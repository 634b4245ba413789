"""Optional packages: what some names in a sweep file need beside the package itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import ConfigError, Fault
from tune_easytrain.yaml_source import read_file


@dataclass(frozen=True, slots=True)
class _Need:
    """An extra of this package, and the packages in it that are needed, by the modules they bring."""

    extra: str
    packages: Mapping[str, str]

    def missing(self) -> list[str]:
        return [package for module, package in self.packages.items() if not importlib.util.find_spec(module)]


_SEARCHES = {
    "optuna": _Need("search", {"optuna": "optuna"}),
    "bohb": _Need("bohb", {"ConfigSpace": "ConfigSpace", "hpbandster": "hpbandster"}),
}
_SCHEDULERS = {"pb2": _Need("search", {"sklearn": "scikit-learn"})}


def check_packages(config: SweepConfig) -> None:
    """Raise ConfigError where the sweep's search or scheduler needs a package that is not installed here.

    Only the process that drives the sweep needs them.
    """
    run = config.run
    needs = {
        ("search", run.search): _SEARCHES.get(run.search),
        ("scheduler", name := "" if run.scheduler is None else run.scheduler.name): _SCHEDULERS.get(name),
    }
    faults = [
        _fault(config, key, name, missing, need.extra)
        for (key, name), need in needs.items()
        if need is not None and (missing := need.missing())
    ]
    if faults:
        raise ConfigError(faults)


def _fault(config: SweepConfig, key: str, name: str, missing: list[str], extra: str) -> Fault:
    problem = f"{name!r} needs {' and '.join(missing)}, which this Python does not have"
    remedy = f"pip install 'tune-easytrain[{extra}]'"
    if config.source_path is None:
        return Fault("<config>", f"run.{key}", problem, remedy)
    source, _ = read_file(config.source_path)
    return source.fault(("run", key), problem, remedy)
