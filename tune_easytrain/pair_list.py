"""The pair list of a sweep for one kind of GPU: each model with the most samples of it that fit at once."""

from __future__ import annotations

import json
import re
from typing import Any

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import BadInputError, NotEnoughMemoryError
from tune_easytrain.memory_plan import UNLIMITED_SAMPLES, MemoryPlan, TrialMemory
from tune_easytrain.probe import largest_power_of_two
from tune_easytrain.search_space import choose_pairing, distributions
from tune_easytrain.trial_space import BATCH_SIZE_KEY, MODEL_KEY
from tune_easytrain.yaml_source import read_text

_INDENT = "    "
_PLAIN = re.compile(r"[\w./-]+")


def pair_list(config: SweepConfig, plan: MemoryPlan, *, power_of_two: bool = False) -> str:
    """Return the paired grid lists of a sweep as YAML to paste under `grid_search.grid`.

    Every row of the pair group keeps its values and gets as `hp.batch_size` the most samples that fit at
    once in every trial of that row, up to `batch.effective_batch_size`, whatever the file gives now. Rows
    that do not fit, or have no estimate, are left out and told in a comment.

    Args:
        config: the sweep; `plan` must be of all its trials.
        plan: their estimates.
        power_of_two: round down to a power of two.

    Raises:
        BadInputError: the models are drawn from a distribution, so there is no list of them.
        NotEnoughMemoryError: nothing is left to write.
    """
    if MODEL_KEY in distributions(config.grid_search):
        raise BadInputError(f"--write-pairs: {MODEL_KEY} is drawn from a distribution; list its values")
    keys = _group_without_batch_size(config)
    rows: dict[str, list[TrialMemory]] = {}
    is_packed = config.trial.resources.gpu == "auto"  # shares follow from the sizes that are looked for here
    for given in plan.trials:
        trial = given.on_gpu(1.0, plan.accelerator.total_bytes) if is_packed else given
        rows.setdefault(repr([trial.values[key] for key in keys]), []).append(trial)
    columns: dict[str, list[Any]] = {key: [] for key in (*keys, BATCH_SIZE_KEY)}
    left_out = []
    for trials in rows.values():
        size, reason = _size_of_row(trials)
        row = [trials[0].values[key] for key in keys]
        if not size:
            left_out.append(f"left out: {' '.join(map(_yaml, row)) or 'every trial'}: {reason}")
            continue
        for key, value in zip(
            columns, [*row, largest_power_of_two(size) if power_of_two else size], strict=True
        ):
            columns[key].append(value)
    if not columns[BATCH_SIZE_KEY]:
        raise NotEnoughMemoryError("\n".join(["--write-pairs: nothing fits", *left_out]))
    notes = [*_budget_notes(config, plan), *_pairing_note(config, columns), *left_out]
    return "\n".join(_lines(plan, columns, notes))


def _group_without_batch_size(config: SweepConfig) -> tuple[str, ...]:
    """Return the keys that the batch size is to advance with: its group in the file, else the models'."""
    groups = choose_pairing(config.grid_search).groups
    of_sizes = next((group for group in groups if BATCH_SIZE_KEY in group and len(group) > 1), None)
    of_models = next((group for group in groups if MODEL_KEY in group), ())
    return tuple(key for key in of_sizes or of_models if key != BATCH_SIZE_KEY)


def _size_of_row(trials: list[TrialMemory]) -> tuple[int, str]:
    """Return the most samples that fit at once in all of these trials; with 0 the reason why none do."""
    sizes = []
    for trial in trials:
        size = trial.largest_fitting(trial.config["batch"]["effective_batch_size"] or UNLIMITED_SAMPLES)
        if trial.estimate is None or size is None:
            return 0, f"no estimate: {trial.error}"
        if size == 0:
            return 0, f"one sample needs {format_bytes(trial.estimate.peak_bytes(1))}"
        sizes.append(size)
    return min(sizes), ""


def _budget_notes(config: SweepConfig, plan: MemoryPlan) -> list[str]:
    """Return what these sizes hang on besides the GPU, and what hangs on them."""
    notes = [] if plan.budget_note is None else [plan.budget_note]
    if config.batch.effective_batch_size is None:
        notes.append(
            "batch.effective_batch_size is not set: each model would train at its own hp.batch_size; "
            "set it to compare them at one"
        )
    return notes


def _pairing_note(config: SweepConfig, columns: dict[str, list[Any]]) -> list[str]:
    """Return the `pair` that the lists need in the file, where `auto` would not pair them by itself."""
    group, pair = list(columns), config.grid_search.pair
    if len(columns[BATCH_SIZE_KEY]) < 2 or len(group) < 2:
        return []
    if pair == "auto" and group == [MODEL_KEY, BATCH_SIZE_KEY]:
        return []
    others = [] if isinstance(pair, str) else [list(other) for other in pair if not set(other) & set(group)]
    given = [] if isinstance(pair, str) else [set(other) for other in pair]
    return [] if set(group) in given else [f"with pair: {_yaml([*others, group])}"]


def _lines(plan: MemoryPlan, columns: dict[str, list[Any]], notes: list[str]) -> list[str]:
    name, total = plan.accelerator.name, format_bytes(plan.accelerator.total_bytes)
    width = max(map(len, columns)) + 1
    return [
        f"{_INDENT}# as estimated for {name} ({total})",
        *(f"{_INDENT}# {note}" for note in notes),
        *(f"{_INDENT}{key + ':':<{width}} {_yaml(values)}" for key, values in columns.items()),
    ]


def _yaml(value: Any) -> str:
    """Return a value on one line of YAML, which the sweep file's own reader reads as the same value."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and read_text(value, "")[0].data == value:
        return value
    return json.dumps(value, ensure_ascii=False)
