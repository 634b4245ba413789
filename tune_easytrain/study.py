"""`Study`: what a sweep says about batch sizes: an arm for each model and batch size, over its seeds."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import pandas as pd

from tune_easytrain.columns import Mode, is_missing
from tune_easytrain.errors import BadInputError
from tune_easytrain.frame import as_text
from tune_easytrain.results import SweepResults
from tune_easytrain.settings import EVALUATE_ONLY, evaluates_only
from tune_easytrain.trial_space import (
    BATCH_SIZE_KEY,
    EFFECTIVE_BATCH_SIZE_KEY,
    MODEL_KEY,
    SECTION_NAMES,
    flatten_config,
)

SEED_KEY = "train.seed"
FUNCTION_KEY = "train.function"
NEUTRAL_KEYS = (
    SEED_KEY,
    "train.noise_scale",
    "train.loader_workers",
    "batch.memory_fraction",
    "batch.memory_budget",
    "batch.probe",
    "batch.search",
    "batch.start",
    "batch.knob",
    "batch.start_from",
    "batch.probe_timeout",
    "batch.exact",
)
"""Keys of a trial's config that may differ between runs whose trials are one arm: they say how memory and
devices are used and what is measured, not what comes of a trial. So may all of `trial` and `run` but
`trial.num_workers` and `run.scheduler`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trial that came to its end.

    Attributes:
        trial_id: the trial's id.
        metric: its best value, NaN where it has none.
        epoch_seconds: wall time of each epoch, with evaluation.
        metrics: the metric after each epoch, NaN where it was not reported.
    """

    trial_id: str
    metric: float
    epoch_seconds: tuple[float, ...]
    metrics: tuple[float, ...]

    @property
    def hours(self) -> float:
        """How long it trained, with evaluation; the start and the probe are left out."""
        return sum(self.epoch_seconds) / 3600

    def hours_to(self, target: float, mode: Mode) -> float | None:
        """Return how long it trained until the metric was as good as the target; None: it never was."""
        spent = 0.0
        for seconds, value in zip(self.epoch_seconds, self.metrics, strict=True):
            spent += seconds
            if (value >= target) if mode == "max" else (value <= target):
                return spent / 3600
        return None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model at one effective batch size, made in one way; its trials differ in their seeds alone.

    Attributes:
        setting: what is compared beside batch sizes, such as the model, by config key.
        effective_batch_size: in samples; None where no trial knows it.
        limit: the most samples of a micro-batch as the file says (`hp.batch_size`); None: not in the grid.
        settled: config keys that follow from setting and batch size, such as a learning rate paired with it.
        config: the nested config of its first trial, of the run with the number `run_number`.
        seeds: of all its trials.
        runs: its finished trials.
        failures: the errors of its failed trials, by id.
        unfinished_runs: the number of the run of each trial that has not ended.
        microbatch_size, accumulation_steps: of its finished trials, those most have.
        samples_per_second: the mean of its finished trials' last epochs; NaN: not known.
        peak_memory_bytes: the most of its finished trials; None: not known.
        steps_per_epoch: optimizer steps, a short last window among them; None: not known.
        num_samples: samples an epoch; None: not known.
        noise_scale: the mean gradient noise scale, in samples; NaN: not measured.
        num_workers: how many devices a trial had.
        devices: their names.
    """

    setting: Mapping[str, Any]
    effective_batch_size: int | None
    limit: int | None
    settled: Mapping[str, Any]
    config: Mapping[str, Any] = field(repr=False)
    run_number: int
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    failures: Mapping[str, str]
    unfinished_runs: tuple[int, ...]
    microbatch_size: int | None = None
    accumulation_steps: int | None = None
    samples_per_second: float = math.nan
    peak_memory_bytes: int | None = None
    steps_per_epoch: int | None = None
    num_samples: int | None = None
    noise_scale: float = math.nan
    num_workers: int = 1
    devices: tuple[str, ...] = ()

    @property
    def values(self) -> list[float]:
        """The metric of each finished trial."""
        return [run.metric for run in self.runs if not math.isnan(run.metric)]

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN before a trial has finished."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; NaN with fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def epoch_seconds(self) -> float:
        """The median wall time of an epoch; NaN: not known."""
        seconds = [value for run in self.runs for value in run.epoch_seconds]
        return statistics.median(seconds) if seconds else math.nan

    @property
    def hours(self) -> float:
        """The mean time that a trial trained, early stopping included; NaN: not known."""
        return statistics.fmean(run.hours for run in self.runs) if self.runs else math.nan

    @property
    def num_epochs(self) -> float:
        """The mean number of epochs; NaN: not known."""
        return statistics.fmean(len(run.epoch_seconds) for run in self.runs) if self.runs else math.nan

    @property
    def num_unfinished(self) -> int:
        """How many of its trials have not ended."""
        return len(self.unfinished_runs)

    @property
    def is_accumulated(self) -> bool:
        """Whether a step is made of several micro-batches."""
        return (self.accumulation_steps or 1) > 1

    @property
    def name(self) -> str:
        """What tells it from the others: the setting, and the batch size with how it is made."""
        return ", ".join(filter(None, (self.setting_name, self.batch_name)))

    @property
    def setting_name(self) -> str:
        """The setting in words; empty where there is none."""
        return ", ".join(_setting_text(key, value) for key, value in self.setting.items())

    @property
    def batch_name(self) -> str:
        """The effective batch size, with the micro-batches it is made of where there are several."""
        if self.effective_batch_size is None:
            return "E unknown" if self.limit is None else f"micro-batches of {self.limit}"
        if self.is_accumulated:
            return f"E = {self.effective_batch_size} as {self.accumulation_steps} × {self.microbatch_size}"
        return f"E = {self.effective_batch_size}"

    def hours_to(self, target: float, mode: Mode) -> list[float | None]:
        """Return the time to a target of each finished trial; None for one that never reached it."""
        return [run.hours_to(target, mode) for run in self.runs]

    def cost(self, price_per_hour: float) -> float:
        """Return what a trial costs, at the price of a device's hour."""
        return self.hours * self.num_workers * price_per_hour


@dataclass(frozen=True, kw_only=True)
class Study:
    """The arms of a sweep, or of several, in their order.

    Attributes:
        name: the sweep's name; of several runs those of their directories.
        places: the run directories.
        metric, mode: what trials are judged by.
        arms: every model and batch size there is a trial of.
        setting_keys: the config keys that are compared beside batch sizes.
        sweeps: each run's sweep as it was run.
        num_only_evaluated: how many trials are left out, since they trained nothing.
    """

    name: str
    places: tuple[str, ...]
    metric: str
    mode: Mode
    arms: tuple[Arm, ...]
    setting_keys: tuple[str, ...]
    sweeps: tuple[Mapping[str, Any], ...] = field(repr=False)
    num_only_evaluated: int = 0

    @property
    def measured(self) -> list[Arm]:
        """The arms of which a trial has finished with the metric."""
        return [arm for arm in self.arms if arm.values]

    def better(self, value: float, other: float) -> float:
        """Return by how much a value is better than another; negative where it is worse."""
        return value - other if self.mode == "max" else other - value

    def settings(self) -> list[Mapping[str, Any]]:
        """Return the distinct settings, in order."""
        found: dict[str, Mapping[str, Any]] = {}
        for arm in self.arms:
            found.setdefault(as_text(dict(arm.setting)), arm.setting)
        return list(found.values())


def build_study(*runs: SweepResults) -> Study:
    """Return what the results of a sweep say as they stand, or those of several about the same metric.

    Trials that only evaluate are left out. Of trials of an arm that have the same seed the last one counts.
    Raises BadInputError where the sweeps are judged by different metrics, or none of them trains.
    """
    _require_one_metric(runs)
    trials = [trial for number, run in enumerate(runs) for trial in _trials(number, run)]
    trained = [trial for trial in trials if not evaluates_only(trial.config)]
    if not trained and (trials or all(evaluates_only(run.sweep()) for run in runs)):
        raise _nothing_trained(runs)
    keys = _telling_keys(runs, trained)
    has_limits = BATCH_SIZE_KEY in keys
    others = [key for key in keys if key not in (EFFECTIVE_BATCH_SIZE_KEY, BATCH_SIZE_KEY, SEED_KEY)]
    # What differs only between runs does not go with a batch size, be there one batch size for each run.
    within = {key for run in runs for key in run.varied_keys()}
    settled_keys = [key for key in others if key in within and _is_settled(trained, key)]
    setting_keys = [key for key in others if key not in settled_keys]
    groups: dict[str, list[_Trial]] = {}
    for trial in trained:
        limit = trial.values.get(BATCH_SIZE_KEY) if has_limits else None
        setting = {key: trial.values.get(key) for key in setting_keys}
        groups.setdefault(as_text([setting, trial.size, limit]), []).append(trial)
    return Study(
        name=_name(runs),
        places=tuple(run.place for run in runs),
        metric=runs[0].metric,
        mode=runs[0].mode,
        arms=tuple(
            _arm(group, setting_keys, settled_keys, runs[0].metric, has_limits=has_limits)
            for group in groups.values()
        ),
        setting_keys=tuple(setting_keys),
        sweeps=tuple(run.sweep() for run in runs),
        num_only_evaluated=len(trials) - len(trained),
    )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A trial of a run: its row of the frame, its curve, its config as it is and by dotted keys."""

    run_number: int
    row: pd.Series[Any]
    curve: pd.DataFrame | None
    config: Mapping[str, Any]
    values: Mapping[str, Any]

    @property
    def size(self) -> int | None:
        """Its effective batch size: as it was planned, else as the sweep file has it; None: not known."""
        named = (self.values.get(EFFECTIVE_BATCH_SIZE_KEY), self.values.get(BATCH_SIZE_KEY))
        sizes = (self.row["effective_batch_size"], *named)
        whole = (size for size in sizes if isinstance(size, Integral) and not isinstance(size, bool))
        return next(map(int, whole), None)

    @property
    def seed(self) -> int | None:
        """Its seed."""
        return self.values.get(SEED_KEY)

    def text(self, key: str) -> str:
        """Return the value of a key as a text to compare by."""
        return as_text(self.values.get(key))


def _trials(number: int, run: SweepResults) -> Iterator[_Trial]:
    """Yield a run's trials, each with the constants of its sweep where its own config says nothing."""
    sweep, frame = run.sweep(), run.frame()
    curves = {str(name): rows for name, rows in run.history().groupby("trial_id", sort=False)}
    configs = {record.trial_id: record.config for record in run.records()}
    constants = {**sweep["config"], **{name: sweep[name] for name in SECTION_NAMES}}
    outside = {"task": sweep.get("task"), "run.scheduler": sweep["run"].get("scheduler")}
    outside["trial.num_workers"] = (sweep.get("trial") or {}).get("num_workers")
    for _, row in frame.iterrows():
        name = str(row["trial_id"])
        config = _merged(constants, configs[name])
        values = {key: None if value == {} else value for key, value in flatten_config(config).items()}
        yield _Trial(
            run_number=number, row=row, curve=curves.get(name), config=config, values={**outside, **values}
        )


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _merged(below[key], above[key])
    return merged


def _require_one_metric(runs: Sequence[SweepResults]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if (run.metric, run.mode) != (first.metric, first.mode):
            raise BadInputError(
                f"{run.place} is judged by {run.metric} ({run.mode}), {first.place} by {first.metric} "
                f"({first.mode}); report them on their own"
            )


def _nothing_trained(runs: Sequence[SweepResults]) -> BadInputError:
    commands = " and ".join(f"tune-easytrain results {shlex.quote(run.place)}" for run in runs)
    return BadInputError(
        f"{' and '.join(run.place for run in runs)}: every trial only evaluates ({FUNCTION_KEY}: "
        f"{EVALUATE_ONLY}), so there is no batch size to choose; use {commands}"
    )


def _name(runs: Sequence[SweepResults]) -> str:
    """Return the sweep's name; of several runs that of each run directory, as their sweeps may share one."""
    if len(runs) == 1:
        return str(runs[0].sweep().get("name", ""))
    return " and ".join(dict.fromkeys(run.place.rstrip("/").rpartition("/")[2] for run in runs))


def _telling_keys(runs: Sequence[SweepResults], trials: Sequence[_Trial]) -> list[str]:
    """Return the keys that tell trials apart: those of the grids, then those that differ between runs."""
    keys = dict.fromkeys(key for run in runs for key in run.varied_keys())
    if len({trial.text(FUNCTION_KEY) for trial in trials}) < 2:  # but for those that only evaluate
        keys.pop(FUNCTION_KEY, None)
    if len({trial.run_number for trial in trials}) > 1:
        known = dict.fromkeys(key for trial in trials for key in trial.values if key not in NEUTRAL_KEYS)
        keys |= dict.fromkeys(key for key in known if len({trial.text(key) for trial in trials}) > 1)
    return list(keys)


def text_of(value: Any) -> str:
    """Return a config's value as people read it."""
    return value if isinstance(value, str) else "not set" if value is None else as_text(value)


def _setting_text(key: str, value: Any) -> str:
    """Return a setting as it stands in a name: a text speaks for itself, a number needs its key."""
    if isinstance(value, str):
        return value
    return f"{key.rpartition('.')[2]} {'=' if value is not None else ''} {text_of(value)}".replace("  ", " ")


def _is_settled(trials: Sequence[_Trial], key: str) -> bool:
    """Return whether a key has one value for each of several batch sizes, as a rate paired with them has.

    The model never counts as settled: trials of one model at each batch size compare nothing.
    """
    known: dict[int | None, set[str]] = {}
    for trial in trials:
        known.setdefault(trial.size, set()).add(trial.text(key))
    return key != MODEL_KEY and len(known) > 1 and all(len(values) == 1 for values in known.values())


def _arm(
    trials: Sequence[_Trial],
    setting_keys: Sequence[str],
    settled_keys: Sequence[str],
    metric: str,
    *,
    has_limits: bool,
) -> Arm:
    first = trials[0]
    by_seed = {
        (trial.seed, number if trial.seed is None else None): trial
        for number, trial in enumerate(trials)
        if trial.row["state"] in ("finished", "stopped") and not is_missing(trial.row[f"{metric}_best"])
    }
    done = pd.DataFrame([trial.row for trial in by_seed.values()], columns=first.row.index)
    states = [(trial, trial.row["state"]) for trial in trials]
    unfinished = [trial for trial, state in states if state not in ("finished", "stopped", "failed")]
    limit = first.values.get(BATCH_SIZE_KEY)
    epochs = done["epochs"].dropna().tolist()
    return Arm(
        setting={key: first.values.get(key) for key in setting_keys},
        effective_batch_size=first.size,
        limit=limit if has_limits and isinstance(limit, int) else None,
        settled={key: first.values.get(key) for key in settled_keys},
        config=first.config,
        run_number=first.run_number,
        seeds=tuple(sorted({trial.seed for trial in trials if isinstance(trial.seed, int)})),
        runs=tuple(_run(trial.row, trial.curve, metric) for trial in by_seed.values()),
        failures={
            str(trial.row["trial_id"]): trial.row["error"] for trial, state in states if state == "failed"
        },
        unfinished_runs=tuple(trial.run_number for trial in unfinished),
        microbatch_size=_most_common(done["microbatch_size"]),
        accumulation_steps=_most_common(done["accumulation_steps"]),
        samples_per_second=_mean(done["samples_per_second"]),
        peak_memory_bytes=_largest(done["peak_memory_bytes"]),
        steps_per_epoch=_an_epoch(done["optimizer_steps"].dropna().tolist(), epochs),
        num_samples=_an_epoch(done["num_samples"].dropna().tolist(), epochs),
        noise_scale=_mean(done["gradient_noise_scale"]),
        num_workers=_most_common(done["num_workers"]) or 1,
        devices=tuple(dict.fromkeys(str(name) for name in done["device"].dropna())),
    )


def _mean(values: pd.Series[Any]) -> float:
    return statistics.fmean(values.dropna()) if values.notna().any() else math.nan


def _run(row: pd.Series[Any], curve: pd.DataFrame | None, metric: str) -> Run:
    seconds: list[float] = [] if curve is None else curve["epoch_seconds"].astype(float).tolist()
    metrics: list[float] = [math.nan] * len(seconds)
    if curve is not None and metric in curve:
        metrics = curve[metric].astype(float).tolist()
    known = [0.0 if math.isnan(value) else value for value in seconds]
    return Run(
        trial_id=str(row["trial_id"]),
        metric=float(row[f"{metric}_best"]),
        epoch_seconds=tuple(known),
        metrics=tuple(metrics),
    )


def _most_common(values: pd.Series[Any]) -> int | None:
    present = values.dropna()
    return int(statistics.mode(present.tolist())) if len(present) else None


def _largest(values: pd.Series[Any]) -> int | None:
    present = values.dropna()
    return int(present.max()) if len(present) else None


def _an_epoch(totals: Sequence[int], epochs: Sequence[int]) -> int | None:
    """Return what an epoch has of something, where all trials have the same whole number."""
    if len(totals) != len(epochs):
        return None
    shares = {divmod(total, number) for total, number in zip(totals, epochs, strict=True) if number}
    if len(shares) != 1:
        return None
    ((share, rest),) = shares
    return share if rest == 0 else None
