"""What a study leaves open: batch sizes not measured, or with too few seeds, and how to measure them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tune_easytrain.document import Block, Code, Heading, Paragraph
from tune_easytrain.frame import as_text
from tune_easytrain.study import SEED_KEY, Arm, Study
from tune_easytrain.study_plans import unmeasured
from tune_easytrain.study_statistics import FEWEST_SEEDS
from tune_easytrain.trial_space import BATCH_SIZE_KEY, EFFECTIVE_BATCH_SIZE_KEY

_SEEDS_TO_ADD = 3
_LONGEST_ERROR = 160


def describe_unknown(study: Study, sweep_file: str) -> Iterator[Block]:
    """Yield what the study does not tell, each with the command that would measure it."""
    yield Heading("What is not known", 2)
    entries = list(_entries(study, sweep_file))
    if not entries:
        yield Paragraph(
            "Every batch size of the sweep was measured with several seeds. Outside of them nothing is known."
        )
    for sentence, command in entries:
        yield Paragraph(sentence)
        yield Code(command)
    largest = max((arm.effective_batch_size or 0 for arm in study.arms), default=0)
    arms = [arm for arm in study.arms if arm.effective_batch_size == largest]
    if largest:
        arm = next((arm for arm in arms if arm.values), arms[0])  # one that is known to run
        yield Paragraph(f"Beyond E = {largest} nothing was measured. To measure E = {2 * largest}:")
        yield Code(command_for(study, sweep_file, arm, size=2 * largest))


def _entries(study: Study, sweep_file: str) -> Iterator[tuple[str, str]]:
    for arm in unmeasured(study):
        if arm.failures:
            error = next(iter(arm.failures.values()))[:_LONGEST_ERROR]
            yield f"{arm.name}: every trial failed: {error}", command_for(study, sweep_file, arm)
        else:
            yield (
                f"{arm.name}: no trial has ended yet.",
                "\n".join(f"tune-easytrain resume {shlex.quote(place)}" for place in study.places),
            )
    for arm in study.measured:
        if len(arm.values) < FEWEST_SEEDS:
            yield (
                f"{arm.name}: one seed; its spread is not known.",
                command_for(study, sweep_file, arm, seeds=_SEEDS_TO_ADD),
            )


def command_for(study: Study, sweep_file: str, arm: Arm, *, size: int | None = None, seeds: int = 0) -> str:
    """Return the command that measures an arm, or its like with another batch size, or more seeds."""
    values = {**arm.setting, **arm.settled}
    grid = study.sweep.get("grid_search", {}).get("grid", {})
    if EFFECTIVE_BATCH_SIZE_KEY in grid or size is not None:
        values[EFFECTIVE_BATCH_SIZE_KEY] = size or arm.effective_batch_size
    if BATCH_SIZE_KEY in grid and arm.limit is not None:
        values[BATCH_SIZE_KEY] = arm.limit
    if seeds:
        known = grid.get(SEED_KEY, [study.sweep.get("train", {}).get("seed", 0)])
        first = max((seed for seed in known if isinstance(seed, int)), default=0) + 1
        values[SEED_KEY] = list(range(first, first + seeds))
    listed = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
    options = [
        f"--set {shlex.quote(f'grid_search.grid.{key}={as_text(value)}')}" for key, value in listed.items()
    ]
    return " \\\n  ".join([f"tune-easytrain run {shlex.quote(sweep_file)}", *options])
