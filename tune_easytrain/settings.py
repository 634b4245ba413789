"""`TrialSettings`: the `batch`, `train`, `memory` and `run` keys of one trial, plain. No pydantic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tune_easytrain.errors import BadInputError
from tune_easytrain.knob import Knob
from tune_easytrain.probe import Search
from tune_easytrain.training_budget import TrainingBudget
from tune_easytrain.trial_space import value_at

EVALUATE_ONLY = "none"
"""What `train.function` says where a trial is evaluated once, and not trained."""

Precision = Literal["fp32", "bf16", "fp16"]
"""Number format of forward and backward passes; parameters and what they gather keep their own."""

Sharding = Literal["none", "optimizer", "full"]
"""What the workers of a trial split among them instead of each keeping it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSettings:
    """What one trial was asked for; every value has been validated with the sweep file.

    Attributes:
        effective_batch_size: samples behind one optimizer step; None only where nothing is probed.
        microbatch_limit: upper limit of one worker's micro-batch, where the sweep gives one.
        memory_fraction: share of a device's memory that all trials on it may use together.
        memory_budget_bytes: a budget given outright.
        probe: `off` uses the given micro-batch size as it is.
        search: `confirm` is content with the first size that fits, `grow` goes on from it, `power_of_two`
            doubles.
        start: the first size the probe tries; default: what the estimate says.
        probe_timeout_seconds: one attempt that takes longer counts as failed.
        exact: whether a trial whose gradients cannot equal the whole batch's is warned of or refused.
        group_by_length: whether micro-batches are made of samples of like length, where that is known.
        max_tokens: upper limit of one micro-batch in padded tokens, where the sweep gives one.
        epochs, num_samples, num_steps: how much is trained at most, in passes over the training set, samples
            or optimizer steps; exactly one is given.
        patience: epochs without a better metric before training stops; None: never.
        clip_norm: largest gradient norm; None: no clipping.
        lr_scaling: how learning rates chosen for `base_batch_size` samples are scaled to the effective
            batch size.
        warmup_steps: optimizer steps over which the learning rate grows from 0 to its full value.
        noise_scale: whether the gradient noise scale is measured.
        loader_workers: processes that load data; 0: the training process itself.
        compile: whether the model is compiled for training.
        strategy: whether the estimate chooses what is given up for memory.
        checkpointing: what the backward pass computes again: `none`, `blocks`, a share of the blocks, or
            names of classes.
        sharding: what the workers split among them.
        channels_last: whether images and clips lie in memory with their channels last.
        metric, mode: what patience looks at and the sweep is ranked by.
        num_workers: how many workers train the trial together.
        evaluates_only: whether the trial is evaluated once, and not trained.
        knob: what of the workload the sweep probes along; None: nothing.
    """

    effective_batch_size: int | None
    microbatch_limit: int | None
    memory_fraction: float
    memory_budget_bytes: int | None
    probe: Literal["auto", "off"]
    search: Search
    start: int | None
    probe_timeout_seconds: float
    exact: Literal["warn", "required"]
    group_by_length: bool
    max_tokens: int | None
    epochs: int | None
    num_samples: int | None
    num_steps: int | None
    patience: int | None
    clip_norm: float | None
    lr_scaling: Literal["none", "linear", "sqrt"]
    base_batch_size: int | None
    warmup_steps: int
    noise_scale: bool
    seed: int
    precision: Precision
    loader_workers: int
    compile: bool
    strategy: Literal["none", "auto"]
    checkpointing: str | float | tuple[str, ...]
    sharding: Sharding
    channels_last: bool
    metric: str
    mode: Literal["min", "max"]
    num_workers: int = 1
    evaluates_only: bool = False
    knob: Knob | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, metric: str, mode: Literal["min", "max"], num_workers: int = 1
    ) -> TrialSettings:
        """Read one trial's nested config, whose `batch`, `train` and `memory` sections are complete."""
        batch, train, memory = config["batch"], config["train"], config["memory"]
        checkpointing = memory["checkpointing"]
        effective_batch_size, microbatch_limit = batch_sizes(config)
        return cls(
            effective_batch_size=effective_batch_size,
            microbatch_limit=microbatch_limit,
            memory_fraction=batch["memory_fraction"],
            memory_budget_bytes=batch["memory_budget"],
            probe=batch["probe"],
            search=batch["search"],
            start=batch["start"],
            probe_timeout_seconds=batch["probe_timeout"],
            exact=batch["exact"],
            group_by_length=batch["group_by_length"],
            max_tokens=batch["max_tokens"],
            epochs=train["epochs"],
            num_samples=train["num_samples"],
            num_steps=train["num_steps"],
            patience=train["patience"],
            clip_norm=train["clip_norm"],
            lr_scaling=train["lr_scaling"],
            base_batch_size=train["base_batch_size"],
            warmup_steps=train["warmup_steps"],
            noise_scale=train["noise_scale"],
            seed=train["seed"],
            precision=train["precision"],
            loader_workers=train["loader_workers"],
            compile=train["compile"],
            strategy=memory["strategy"],
            checkpointing=tuple(checkpointing) if isinstance(checkpointing, list) else checkpointing,
            sharding=memory["sharding"],
            channels_last=memory["channels_last"],
            metric=metric,
            mode=mode,
            num_workers=num_workers,
            evaluates_only=evaluates_only(config),
            knob=find_knob(config),
        )

    def window_size(self, num_samples: int | None) -> int | None:
        """Return how many samples are cut into micro-batches: E, or where nothing is trained all there are.

        `num_samples` is how many there are, None where that is not known.
        """
        return num_samples if self.evaluates_only else self.effective_batch_size

    def given_start(self, limit: int) -> int | None:
        """Return the first size to try, as given or by the knob's rule of thumb; None: it is estimated."""
        if self.start is None and self.knob is not None and self.search == "grow":
            return self.knob.first_size(limit)
        return self.start

    @property
    def budget(self) -> TrainingBudget:
        """How much the trial trains at most."""
        return TrainingBudget.choose(
            epochs=self.epochs, num_samples=self.num_samples, num_steps=self.num_steps
        )

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a metric's value beats the best one so far (None: none yet); NaN never does."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value < best if self.mode == "min" else value > best


def with_strategies_of(config: Mapping[str, Any], settings: TrialSettings) -> dict[str, Any]:
    """Return a trial's nested config with the memory strategies of `settings` in its `memory` section."""
    chosen = {name: getattr(settings, name) for name in ("checkpointing", "sharding")}
    return {**config, "memory": {**config["memory"], **chosen}}


def batch_sizes(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return a trial's effective batch size and the limit of its micro-batch, in samples.

    With `batch.effective_batch_size`, `hp.batch_size` is the limit; without, it is the effective batch size
    itself; where nothing is trained, `hp.batch_size` is the limit, and there is no effective batch size. None
    stands for what is not given.
    """
    given, effective = given_batch_size(config), config["batch"]["effective_batch_size"]
    if evaluates_only(config):
        return None, given
    return (given, None) if effective is None else (effective, given)


def given_batch_size(config: Mapping[str, Any]) -> int | None:
    """Return a trial's `hp.batch_size`, None where there is none."""
    hyperparameters = config.get("hp")
    return hyperparameters.get("batch_size") if isinstance(hyperparameters, Mapping) else None


def evaluates_only(config: Mapping[str, Any]) -> bool:
    """Return whether a trial is evaluated once, and not trained."""
    return bool(config["train"].get("function") == EVALUATE_ONLY)


def find_knob(config: Mapping[str, Any]) -> Knob | None:
    """Return what of a trial's config the sweep probes along, None where the sweep names nothing.

    Raises BadInputError where the trial has no such value, or it is not a positive number.
    """
    key = config["batch"].get("knob")
    if key is None:
        return None
    value = value_at(config, key)
    if not is_knob_value(value):
        raise BadInputError(f"batch.knob: {key} is {value!r} in this trial; it must be a number above 0")
    return Knob(key, value)


def is_knob_value(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf
