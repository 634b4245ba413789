"""Optional packages: what some names in a sweep file, and some commands, need beside the package itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import BadInputError, ConfigError, Fault
from tune_easytrain.yaml_source import YamlPath, YamlSource, read_file


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
_LOGGERS = {name: _Need(name, {name: name}) for name in ("tensorboard", "mlflow", "wandb")}
_COMMANDS = {
    "dashboard": _Need(
        "dashboard", {"dash": "dash", "waitress": "waitress", "optuna": "optuna", "sklearn": "scikit-learn"}
    ),
    "recommendation": _Need("lm", {"transformers": "transformers", "peft": "peft"}),
    "report": _Need("report", {"plotly": "plotly", "scipy": "scipy"}),
}


def check_packages(config: SweepConfig) -> None:
    """Raise ConfigError where search, scheduler or loggers need a package that is not installed here.

    Only the process that drives the sweep needs them.
    """
    run = config.run
    scheduler = "" if run.scheduler is None else run.scheduler.name
    _require(
        config,
        [
            (("search",), run.search, _SEARCHES.get(run.search)),
            (("scheduler",), scheduler, _SCHEDULERS.get(scheduler)),
            *_logger_needs(config),
        ],
    )


def check_logger_packages(config: SweepConfig) -> None:
    """Raise ConfigError where one of the sweep's loggers needs a package that is not installed here."""
    _require(config, _logger_needs(config))


def check_command_packages(command: str) -> None:
    """Raise BadInputError where what a command makes needs a package that is not installed here."""
    need = _COMMANDS[command]
    if missing := need.missing():
        raise BadInputError(
            f"the {command} needs {' and '.join(missing)}, which this Python does not have; "
            f"{_install(need.extra)}"
        )


def _logger_needs(config: SweepConfig) -> list[tuple[YamlPath, str, _Need | None]]:
    return [
        (("loggers", number), logger.name, _LOGGERS[logger.name])
        for number, logger in enumerate(config.run.loggers)
    ]


def _require(config: SweepConfig, needs: Iterable[tuple[YamlPath, str, _Need | None]]) -> None:
    faults = [
        _fault(config, path, name, missing, need.extra)
        for path, name, need in needs
        if need is not None and (missing := need.missing())
    ]
    if faults:
        raise ConfigError(faults)


def _fault(config: SweepConfig, path: YamlPath, name: str, missing: list[str], extra: str) -> Fault:
    problem = f"{name!r} needs {' and '.join(missing)}, which this Python does not have"
    remedy = _install(extra)
    if config.source_path is None:
        source = YamlSource("<config>", None, {})
    else:
        source, _ = read_file(config.source_path)
    return source.fault(("run", *path), problem, remedy)


def _install(extra: str) -> str:
    return f"pip install 'tune-easytrain[{extra}]'"
