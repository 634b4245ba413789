"""Search algorithms and schedulers: the names of a sweep file as what Ray Tune runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search import Searcher

from tune_easytrain.config import SweepConfig
from tune_easytrain.grid import Distribution
from tune_easytrain.search_space import distributions, param_space, perturbed_keys
from tune_easytrain.settings import EVALUATE_ONLY
from tune_easytrain.sweep_shared import TIME

_EPOCHS_UNKNOWN = 10**9
"""What stands for the epochs of a trial whose budget is in samples or steps."""

_CHECKPOINTS_KEPT = 2
"""Per trial: one that is whole, and the one being written."""


def build_searcher(config: SweepConfig) -> Searcher | None:
    """Return what draws the trials' values; None: Ray itself, at random."""
    if config.run.search == "optuna":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce its study
        return OptunaSearch()
    if config.run.search == "bohb":
        from ray.tune.search.bohb import TuneBOHB

        return TuneBOHB()
    return None


def build_scheduler(config: SweepConfig) -> tune.schedulers.TrialScheduler | None:
    """Return what stops or perturbs bad trials; None: nothing does."""
    if config.run.scheduler is None:
        return None
    settings = config.run.scheduler.resolved()
    name = settings.pop("name")
    if name in ("pbt", "pb2"):
        return _build_population(config, name, settings)
    schedulers: dict[str, Callable[..., tune.schedulers.TrialScheduler]] = {
        "asha": tune.schedulers.ASHAScheduler,
        "median": tune.schedulers.MedianStoppingRule,
        "hyperband": ResumableHyperBand,
        "bohb": ResumableHyperBandForBOHB,
    }
    if name == "median":
        settings["min_samples_required"] = settings.pop("min_samples")
    else:
        settings["max_t"] = most_epochs(config) or _EPOCHS_UNKNOWN
    return schedulers[name](time_attr=TIME, **settings)


class _LeavesOutEnded:
    """Keeps the ended trials of a resumed sweep out of the brackets, which would wait for them forever."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not trial.is_finished():
            super().on_trial_add(tune_controller, trial)  # type: ignore[misc]  # a scheduler's


class ResumableHyperBand(_LeavesOutEnded, tune.schedulers.HyperBandScheduler):
    """Hyperband (Li et al. 2018, arXiv:1603.06560) that can be resumed."""


class ResumableHyperBandForBOHB(_LeavesOutEnded, tune.schedulers.HyperBandForBOHB):
    """The part of BOHB (Falkner et al. 2018, arXiv:1807.01774) that stops trials; it can be resumed."""


def _build_population(
    config: SweepConfig, name: str, settings: Mapping[str, Any]
) -> tune.schedulers.PopulationBasedTraining:
    """Return PBT (Jaderberg et al. 2017, arXiv:1711.09846) or PB2 (Parker-Holder et al. 2020, 2002.02518)."""
    drawn = distributions(config.grid_search)
    ranges = {key: (drawn[key].args[0], drawn[key].args[1]) for key in perturbed_keys(config)}
    common = {"time_attr": TIME, "custom_explore_fn": _StayWithin(ranges), **settings}
    if name == "pb2":
        return PB2(hyperparam_bounds={key: list(bounds) for key, bounds in ranges.items()}, **common)
    domains = param_space(config)
    return tune.schedulers.PopulationBasedTraining(
        hyperparam_mutations={key: domains[key] for key in ranges}, **common
    )


@dataclass(frozen=True)
class _StayWithin:
    """Puts perturbed values back into the ranges that they were first drawn from."""

    ranges: Mapping[str, tuple[float, float]]

    def __call__(self, params: dict[str, Any]) -> dict[str, Any]:
        within = {key: min(max(params[key], low), high) for key, (low, high) in self.ranges.items()}
        return {**params, **within}


def num_checkpoints_kept(config: SweepConfig) -> int:
    """Return how many of its last checkpoints a trial keeps.

    With `pbt` and `pb2` another trial may take one over that is up to two intervals old.
    """
    scheduler = config.run.scheduler
    if scheduler is None or scheduler.name not in ("pbt", "pb2"):
        return _CHECKPOINTS_KEPT
    return 2 * scheduler.perturbation_interval + 2 * _CHECKPOINTS_KEPT


def most_epochs(config: SweepConfig) -> int | None:
    """Return the most epochs that a trial trains; None where it is not known.

    That is where a budget is in samples or steps, and where a function of the user's own decides.
    """
    if _train_values(config, "num_samples") or _train_values(config, "num_steps"):
        return None
    if config.train.function == EVALUATE_ONLY:
        return 1
    has_own_function = config.train.function is not None or "train.function" in config.grid_search.grid
    return max(_train_values(config, "epochs"), default=None if has_own_function else 1)


def _train_values(config: SweepConfig, name: str) -> list[int]:
    entry = config.grid_search.grid.get(f"train.{name}", (getattr(config.train, name),))
    values = entry.listed() if isinstance(entry, Distribution) else entry
    return [value for value in values if value is not None]
