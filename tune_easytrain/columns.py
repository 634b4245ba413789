"""The columns of the frames: names, dtypes, units and meanings of those that are always there.

No pandas: a dtype is named as pandas names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["min", "max"]
"""Whether less or more of something is better."""


@dataclass(frozen=True, slots=True)
class Column:
    """One fixed column: its name, pandas dtype, unit (empty: none), and meaning.

    `better` says whether less or more of it is better; None: neither, or it depends.
    """

    name: str
    dtype: str
    unit: str
    meaning: str
    better: Mode | None = None


COLUMNS = (
    Column("trial_id", "string", "", "the trial's id; ids sort in the sweep file's order"),
    Column(
        "state",
        "string",
        "",
        "pending, probing, training, interrupted, finished, stopped (by the scheduler) or failed",
    ),
    Column("error", "string", "", "why the trial failed, with the error's type; empty where it did not"),
    Column("effective_batch_size", "Int64", "samples", "behind one optimizer step, over all workers"),
    Column("microbatch_size", "Int64", "samples", "in the largest forward and backward pass of one worker"),
    Column("accumulation_steps", "Int64", "", "micro-batches behind one optimizer step on one worker"),
    Column("num_workers", "Int64", "", "processes that trained the trial together"),
    Column("device", "string", "", "the device's name, cpu for a CPU"),
    Column("strategy", "string", "", "what `memory.strategy: auto` chose, and what it costs; else empty"),
    Column(
        "probe_attempts",
        "Int64",
        "",
        "micro-batch sizes tried on the device; 0 with the probe off",
        better="min",
    ),
    Column("probe_cached", "boolean", "", "whether it only had to confirm what another trial had found"),
    Column(
        "probe_rule_of_thumb",
        "Int64",
        "samples",
        "where the rule of thumb would begin; missing unless `batch.knob`",
    ),
    Column(
        "probe_estimate", "Int64", "samples", "the most that fit by the estimate; missing where none is made"
    ),
    Column("probe_seconds", "float64", "s", "wall time of these attempts", better="min"),
    Column("memory_budget_bytes", "Int64", "bytes", "what one worker was allowed to use of its device"),
    Column(
        "peak_memory_bytes",
        "Int64",
        "bytes",
        "the most device memory in use at once while training",
        better="min",
    ),
    Column(
        "num_rescues",
        "Int64",
        "",
        "times memory ran out in training and a window was replayed smaller",
        better="min",
    ),
    Column(
        "num_failures",
        "Int64",
        "",
        "times a fault that was not its own ended it, and it went on from a checkpoint",
        better="min",
    ),
    Column(
        "samples_per_second",
        "float64",
        "samples/s",
        "trained in the last epoch, evaluation left out; where nothing is trained, evaluated",
        better="max",
    ),
    Column(
        "data_wait_share",
        "float64",
        "",
        "share of that time in which the device waited for data",
        better="min",
    ),
    Column(
        "gpu_utilization", "float64", "", "share of that time in which kernels ran on the GPU", better="max"
    ),
    Column(
        "tokens_per_second",
        "float64",
        "tokens/s",
        "trained in the last epoch without padding; missing unless the task has `lengths`",
        better="max",
    ),
    Column(
        "padding_share", "float64", "", "share of the last epoch's tokens that were padding", better="min"
    ),
    Column("optimizer_steps", "Int64", "", "optimizer steps taken"),
    Column("num_samples", "Int64", "samples", "trained on, each counted once per epoch"),
    Column("learning_rate", "float64", "", "of the first parameter group after the last epoch"),
    Column(
        "gradient_noise_scale",
        "float64",
        "samples",
        "batch size at which noise and signal of a step are equal; missing unless `train.noise_scale`",
    ),
    Column("epochs", "Int64", "", "epochs reported; a budget of samples or steps may end inside the last"),
    Column("best_epoch", "Int64", "", "the epoch in which the sweep's metric was best"),
    Column("epoch_seconds", "float64", "s", "wall time of the last epoch, with evaluation", better="min"),
)
"""The columns every frame has, zero trials or many. Behind the first three stands the trial's config, one
column per key (`model.type`); behind all of them the metrics, two columns each (`<metric>_last`, and
`<metric>_best` from the epoch in which the sweep's metric was best), and the `batch.`, `train.` and
`memory.` keys."""

HISTORY_COLUMNS = (
    Column("trial_id", "string", "", "the trial's id"),
    Column("epoch", "Int64", "", "counted from 1; missing where a training function reports parts of epochs"),
    Column("time", "datetime64[us, UTC]", "", "when it was reported"),
    Column("epoch_seconds", "float64", "s", "wall time of the epoch, with evaluation"),
    Column("optimizer_steps", "Int64", "", "optimizer steps taken so far"),
    Column("num_samples", "Int64", "samples", "trained on so far"),
    Column(
        "peak_memory_bytes", "Int64", "bytes", "the most device memory in use at once so far", better="min"
    ),
    Column("num_rescues", "Int64", "", "times that memory ran out so far"),
    Column("learning_rate", "float64", "", "of the first parameter group after the epoch"),
    Column("gradient_noise_scale", "float64", "samples", "see `gradient_noise_scale` above"),
    Column("samples_per_second", "float64", "samples/s", "trained, evaluation left out"),
    Column("data_wait_share", "float64", "", "share of that time in which the device waited"),
    Column("gpu_utilization", "float64", "", "share of it in which kernels ran on the GPU"),
    Column("tokens_per_second", "float64", "tokens/s", "trained, without padding"),
    Column("padding_share", "float64", "", "share of the tokens that were padding"),
)
"""The columns of every history. Behind `trial_id` stand the grid keys that vary, behind all of them the
metrics, float64, under their own names."""

COMPARISON_COLUMNS = (
    Column("found_in", "string", "", "both, a or b: the runs that have the trial"),
    Column("trial_id_a", "string", "", "the trial's id in the first run"),
    Column("trial_id_b", "string", "", "its id in the second"),
    Column("state_a", "string", "", "its state in the first run"),
    Column("state_b", "string", "", "its state in the second"),
    Column("<metric>_a", "float64", "", "the metric's best value in the first run"),
    Column("<metric>_b", "float64", "", "its best value in the second"),
    Column("<metric>_difference", "float64", "", "the second less the first"),
    Column("samples_per_second_a", "float64", "samples/s", "trained in the last epoch of the first run"),
    Column("samples_per_second_b", "float64", "samples/s", "and of the second"),
    Column("samples_per_second_ratio", "float64", "", "the second over the first: above 1 it is faster"),
    Column("peak_memory_bytes_a", "Int64", "bytes", "the most device memory in use at once in the first run"),
    Column("peak_memory_bytes_b", "Int64", "bytes", "and in the second"),
    Column("peak_memory_bytes_ratio", "float64", "", "the second over the first: above 1 it needs more"),
)
"""The columns of every comparison. Before them stand the config keys by which trials were matched, behind
them `<key>_a` and `<key>_b` of the others that differ."""

SECTION_DTYPES: Mapping[str, str] = {
    "batch.effective_batch_size": "Int64",
    "batch.memory_fraction": "Float64",
    "batch.memory_budget": "Int64",
    "batch.probe": "string",
    "batch.search": "string",
    "batch.start": "Int64",
    "batch.knob": "string",
    "batch.start_from": "Float64",
    "batch.probe_timeout": "Float64",
    "batch.exact": "string",
    "batch.group_by_length": "boolean",
    "batch.max_tokens": "Int64",
    "train.epochs": "Int64",
    "train.num_samples": "Int64",
    "train.num_steps": "Int64",
    "train.patience": "Int64",
    "train.clip_norm": "Float64",
    "train.lr_scaling": "string",
    "train.base_batch_size": "Int64",
    "train.warmup_steps": "Int64",
    "train.noise_scale": "boolean",
    "train.seed": "Int64",
    "train.precision": "string",
    "train.compile": "boolean",
    "train.function": "string",
    "train.loader_workers": "Int64",
    "memory.strategy": "string",
    "memory.sharding": "string",
    "memory.channels_last": "boolean",
}
"""Dtypes of the keys of a sweep file's sections, also where nobody sets them. `memory.checkpointing` is not
here: it is a word, a share or a list."""

_EXACT_IN_FLOAT = 2**53


def is_missing(value: Any) -> bool:
    """Return whether a value of a config or a cell is none: None, NaN, or what pandas puts in its place."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def scalar_dtype(values: Iterable[Any]) -> str | None:
    """Return the nullable dtype that holds scalars as they are, `object` where no single one does.

    Integers among floats become floats. What is missing counts for nothing; None where all is.
    """
    present = [value for value in values if not is_missing(value)]
    kinds = {type(value) for value in present}
    if not kinds:
        return None
    if kinds == {str}:
        return "string"
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        return "Int64" if all(-(2**63) <= value < 2**63 for value in present) else "object"
    if kinds <= {int, float}:
        exact = all(abs(value) <= _EXACT_IN_FLOAT for value in present if isinstance(value, int))
        return "Float64" if exact else "object"
    return "object"


def config_dtype(key: str, values: Iterable[Any]) -> str:
    """Return the dtype of a config column: its section's, or that of all values it can have; else object."""
    found = scalar_dtype(values)
    fixed = SECTION_DTYPES.get(key)
    if fixed is not None and (found in (None, fixed) or (found, fixed) == ("Int64", "Float64")):
        return fixed
    return found or "object"
