"""`Study`: what a sweep says about batch sizes: an arm for each model and batch size, over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from tune_easytrain.columns import Mode, is_missing
from tune_easytrain.errors import BadInputError
from tune_easytrain.frame import as_text
from tune_easytrain.results import SweepResults
from tune_easytrain.trial_space import BATCH_SIZE_KEY, EFFECTIVE_BATCH_SIZE_KEY, MODEL_KEY

SEED_KEY = "train.seed"
_RUN = "number of the run"


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
        runs: its finished trials.
        failures: the errors of its failed trials, by id.
        num_unfinished: how many of its trials have not ended.
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
    runs: tuple[Run, ...]
    failures: Mapping[str, str]
    num_unfinished: int
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
    def is_accumulated(self) -> bool:
        """Whether a step is made of several micro-batches."""
        return (self.accumulation_steps or 1) > 1

    @property
    def name(self) -> str:
        """What tells it from the others: the setting, and the batch size with how it is made."""
        return ", ".join([*(text_of(value) for value in self.setting.values()), self.batch_name])

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
    """A sweep's arms, in the sweep's order.

    Attributes:
        name: the sweep's name.
        places: the run directories.
        metric, mode: what trials are judged by.
        arms: every model and batch size there is a trial of.
        setting_keys: the config keys that are compared beside batch sizes.
        sweep: the sweep as it was run.
    """

    name: str
    places: tuple[str, ...]
    metric: str
    mode: Mode
    arms: tuple[Arm, ...]
    setting_keys: tuple[str, ...]
    sweep: Mapping[str, Any] = field(repr=False)

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

    Of trials of an arm that have the same seed the last one counts. Raises BadInputError where the sweeps
    are judged by different metrics.
    """
    first = runs[0]
    for run in runs[1:]:
        if (run.metric, run.mode) != (first.metric, first.mode):
            raise BadInputError(
                f"{run.place} is judged by {run.metric} ({run.mode}), {first.place} by {first.metric} "
                f"({first.mode}); report them on their own"
            )
    frame = pd.concat(
        [run.frame().assign(**{_RUN: number}) for number, run in enumerate(runs)], ignore_index=True
    )
    varied = [key for key in _varied_keys(runs, frame) if key in frame]
    others = [key for key in varied if key not in (EFFECTIVE_BATCH_SIZE_KEY, BATCH_SIZE_KEY, SEED_KEY)]
    sizes = _effective_sizes(frame)
    limits = frame[BATCH_SIZE_KEY].tolist() if BATCH_SIZE_KEY in varied else [None] * len(frame)
    settled_keys = [key for key in others if _is_settled(frame, key, sizes)]
    setting_keys = [key for key in others if key not in settled_keys]
    curves = {
        (number, str(name)): rows
        for number, run in enumerate(runs)
        for name, rows in run.history().groupby("trial_id", sort=False)
    }
    groups: dict[str, list[int]] = {}
    for row in range(len(frame)):
        setting = {key: _plain(frame[key].iloc[row]) for key in setting_keys}
        groups.setdefault(as_text([setting, sizes[row], _plain(limits[row])]), []).append(row)
    arms = [
        _arm(
            frame.iloc[rows], sizes[rows[0]], _plain(limits[rows[0]]), setting_keys, settled_keys, curves,
            first.metric,
        )
        for rows in groups.values()
    ]  # fmt: skip
    return Study(
        name=str(first.sweep().get("name", "")),
        places=tuple(run.place for run in runs),
        metric=first.metric,
        mode=first.mode,
        arms=tuple(arms),
        setting_keys=tuple(setting_keys),
        sweep=first.sweep(),
    )


def _varied_keys(runs: Sequence[SweepResults], frame: pd.DataFrame) -> list[str]:
    """Return the columns of the keys that differ within a run's grid, or between the runs' grids."""
    keys = dict.fromkeys(key for run in runs for key in run.varied_keys())
    if len(runs) > 1:
        for run in runs:
            grid = run.sweep()["grid_search"]["grid"]
            keys |= dict.fromkeys(
                key for key in grid if key in frame and frame[key].astype(str).nunique() > 1
            )
    return [f"config.{key}" if f"config.{key}" in frame else key for key in keys]


def text_of(value: Any) -> str:
    """Return a config's value as people read it."""
    return value if isinstance(value, str) else "" if value is None else as_text(value)


def _effective_sizes(frame: pd.DataFrame) -> list[int | None]:
    """Return each trial's effective batch size: as it was planned, else as the sweep file has it."""
    columns = [
        frame[name].tolist()
        for name in ("effective_batch_size", EFFECTIVE_BATCH_SIZE_KEY, BATCH_SIZE_KEY)
        if name in frame
    ]
    found = []
    for values in zip(*columns, strict=True):
        known = [int(value) for value in values if isinstance(value, int) and not isinstance(value, bool)]
        found.append(known[0] if known else None)
    return found


def _is_settled(frame: pd.DataFrame, key: str, sizes: Sequence[int | None]) -> bool:
    """Return whether a key has one value for each of several batch sizes, as a rate paired with them has.

    The model never counts as settled: trials of one model at each batch size compare nothing.
    """
    known: dict[int | None, set[str]] = {}
    for size, value in zip(sizes, frame[key].tolist(), strict=True):
        known.setdefault(size, set()).add(as_text(_plain(value)))
    return key != MODEL_KEY and len(known) > 1 and all(len(values) == 1 for values in known.values())


def _arm(
    rows: pd.DataFrame,
    size: int | None,
    limit: Any,
    setting_keys: Sequence[str],
    settled_keys: Sequence[str],
    curves: Mapping[tuple[int, str], pd.DataFrame],
    metric: str,
) -> Arm:
    done = rows[rows["state"].isin(["finished", "stopped"]) & rows[f"{metric}_best"].notna()]
    done = done[~done[SEED_KEY].duplicated(keep="last") | done[SEED_KEY].isna()]
    failed = rows[rows["state"] == "failed"]
    ended = rows["state"].isin(["finished", "stopped", "failed"])
    runs = [_run(row, curves.get((row[_RUN], str(row["trial_id"]))), metric) for _, row in done.iterrows()]
    steps, epochs = done["optimizer_steps"].dropna(), done["epochs"].dropna()
    samples = done["num_samples"].dropna()
    return Arm(
        setting={key: _plain(rows[key].iloc[0]) for key in setting_keys},
        effective_batch_size=size,
        limit=limit if isinstance(limit, int) else None,
        settled={key: _plain(rows[key].iloc[0]) for key in settled_keys},
        runs=tuple(runs),
        failures=dict(zip(failed["trial_id"].tolist(), failed["error"].tolist(), strict=True)),
        num_unfinished=int((~ended).sum()),
        microbatch_size=_most_common(done["microbatch_size"]),
        accumulation_steps=_most_common(done["accumulation_steps"]),
        samples_per_second=float(done["samples_per_second"].mean()),
        peak_memory_bytes=_largest(done["peak_memory_bytes"]),
        steps_per_epoch=_an_epoch(steps.tolist(), epochs.tolist()),
        num_samples=_an_epoch(samples.tolist(), epochs.tolist()),
        noise_scale=float(done["gradient_noise_scale"].mean()),
        num_workers=_most_common(done["num_workers"]) or 1,
        devices=tuple(dict.fromkeys(str(name) for name in done["device"].dropna())),
    )


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


def _plain(value: Any) -> Any:
    return None if is_missing(value) else value
