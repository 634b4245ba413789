"""`Recommendation`: how many samples a language model can be fine-tuned with at once. Pure arithmetic.

What it stands on, the memory of a way to fine-tune, comes from two functions that are given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.byte_size import format_bytes
from tune_easytrain.fine_tuning import Change, FineTuning, ResidentMemory, possible_changes
from tune_easytrain.memory_budget import BudgetRequest, probed_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import SearchPlan

MOST_SAMPLES = 4096
"""The largest micro-batch looked for."""

ALWAYS_PLANNED = (32, 64)
"""Effective batch sizes whose accumulation steps are told beside those of the target."""

_PASSES = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one device.

    Attributes:
        total_bytes: what torch reports.
        fraction: the share of it that training may use, as `batch.memory_fraction`.
    """

    total_bytes: int
    fraction: float = 0.9

    @property
    def budget_bytes(self) -> int:
        """What training may use: that share, less what the CUDA context takes."""
        return BudgetRequest(memory_fraction=self.fraction).gpu_budget_bytes(self.total_bytes)

    @property
    def usable_bytes(self) -> int:
        """What a micro-batch may take: a probe leaves a headroom free."""
        return probed_bytes(self.budget_bytes)


@dataclass(frozen=True, slots=True)
class Sizing:
    """The memory of one way to fine-tune, and what of it fits.

    Attributes:
        fine_tuning: the way.
        resident: what a device holds all the time.
        estimate: the peak by micro-batch size; None where what is held all the time is too much already.
        largest: the most samples that fit at once, 0 where not even one does.
    """

    fine_tuning: FineTuning
    resident: ResidentMemory
    estimate: MemoryEstimate | None
    largest: int

    @property
    def least_bytes(self) -> int:
        """The peak with one sample, or what it is at least where there is no estimate."""
        return self.resident.total_bytes if self.estimate is None else self.estimate.peak_bytes(1)

    def plan(self, effective_batch_size: int) -> BatchPlan | None:
        """Return how the first device reaches its share, the largest; None where not one sample fits."""
        if not self.largest:
            return None
        workers = self.fine_tuning.num_devices
        return BatchPlan.build(effective_batch_size, self.largest, num_workers=workers)


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What the peak of one micro-batch is made of, on the device that needs the most; all in bytes.

    Attributes:
        microbatch_size: samples at once.
        resident: weights, gradients and optimizer state.
        activation_bytes: what forward and backward passes take beside those, at most.
        activation_bytes_per_sample: how much of it one more sample takes.
        phase_peak_bytes: the peak of each phase, with everything.
        key_value_cache_bytes: what of generation's peak is its cache; None where nothing is generated.
    """

    microbatch_size: int
    resident: ResidentMemory
    activation_bytes: int
    activation_bytes_per_sample: int
    phase_peak_bytes: dict[str, int]
    key_value_cache_bytes: int | None

    @property
    def fixed_activation_bytes(self) -> int:
        """What passes take whatever the micro-batch: copies of weights in bf16, workspaces, rounding."""
        return self.activation_bytes - self.microbatch_size * self.activation_bytes_per_sample

    @property
    def peak(self) -> tuple[str, int]:
        """The phase with the highest peak, and that peak."""
        return max(self.phase_peak_bytes.items(), key=lambda item: item[1])


@dataclass(frozen=True, slots=True)
class ChangedSizing:
    """One or several changes together, and what they lead to."""

    changes: tuple[Change, ...]
    sizing: Sizing

    @property
    def name(self) -> str:
        """The changes in words."""
        return " + ".join(change.name for change in self.changes)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What is recommended for one way to fine-tune on one kind of device.

    Attributes:
        memory: that of one device.
        target: the effective batch size asked for.
        sizing: the way asked for; it has an estimate.
        changed: where it does not fit, what was tried instead, in that order.
    """

    memory: Memory
    target: int
    sizing: Sizing
    changed: tuple[ChangedSizing, ...]

    @property
    def fits(self) -> bool:
        """Whether at least one sample fits."""
        return self.sizing.largest > 0

    @property
    def missing_bytes(self) -> int:
        """How much more memory one sample takes than may be used; 0 where it fits."""
        return 0 if self.fits else self.sizing.least_bytes - self.memory.usable_bytes

    @property
    def effective_batch_sizes(self) -> tuple[int, ...]:
        """Those that are planned, the target first."""
        return tuple(dict.fromkeys((self.target, *ALWAYS_PLANNED)))

    def parts(self) -> MemoryParts:
        """Return what the peak is made of at the largest micro-batch that the target uses, else at one."""
        sizing, plan = self.sizing, self.sizing.plan(self.target)
        size = 1 if plan is None else plan.microbatch_size
        assert sizing.estimate is not None
        peaks, next_peaks = (sizing.estimate.phase_peak_bytes(m) for m in (size, size + 1))
        passes, next_passes = (max(p[name] for name in _PASSES) for p in (peaks, next_peaks))
        generates = sizing.fine_tuning.task == "generation"
        return MemoryParts(
            microbatch_size=size,
            resident=sizing.resident,
            activation_bytes=passes - sizing.resident.total_bytes,
            activation_bytes_per_sample=next_passes - passes,
            phase_peak_bytes=peaks,
            key_value_cache_bytes=sizing.fine_tuning.key_value_cache_bytes(size) if generates else None,
        )

    def as_json(self) -> dict[str, Any]:
        """Return what scripts get."""
        parts, resident = self.parts(), self.sizing.resident
        return {
            "fine_tuning": self.sizing.fine_tuning.as_json(),
            "memory_bytes": self.memory.total_bytes,
            "budget_bytes": self.memory.budget_bytes,
            "usable_bytes": self.memory.usable_bytes,
            "fits": self.fits,
            "microbatch_limit": self.sizing.largest,
            "missing_bytes": self.missing_bytes,
            "accumulation": self._plans_as_json(self.sizing),
            "num_parameters": resident.num_parameters,
            "num_trained_parameters": resident.num_trained,
            "parts": {
                "microbatch_size": parts.microbatch_size,
                "weight_bytes": resident.weight_bytes,
                "gradient_bytes": resident.gradient_bytes,
                "optimizer_state_bytes": resident.optimizer_state_bytes,
                "activation_bytes": parts.activation_bytes,
                "activation_bytes_per_sample": parts.activation_bytes_per_sample,
                "fixed_activation_bytes": parts.fixed_activation_bytes,
                "key_value_cache_bytes": parts.key_value_cache_bytes,
            },
            "peak_bytes": parts.peak[1],
            "phase_peak_bytes": parts.phase_peak_bytes,
            "changes": [
                {
                    "changes": [change.name for change in changed.changes],
                    "options": [change.option for change in changed.changes],
                    "least_bytes": changed.sizing.least_bytes,
                    "is_estimated": changed.sizing.estimate is not None,
                    "microbatch_limit": changed.sizing.largest,
                    "accumulation": self._plans_as_json(changed.sizing),
                }
                for changed in self.changed
            ],
        }

    def _plans_as_json(self, sizing: Sizing) -> dict[str, Any]:
        return {
            str(size): {
                "microbatch_size": plan.microbatch_size,
                "accumulation_steps": plan.accumulation_steps,
                "microbatch_sizes": list(plan.microbatch_sizes),
            }
            for size in self.effective_batch_sizes
            if (plan := sizing.plan(size)) is not None
        }

    def describe(self) -> list[str]:
        """Return for people what is estimated, and whether it fits."""
        way, resident, memory = self.sizing.fine_tuning, self.sizing.resident, self.memory
        trained = "" if way.method == "full" else f", {resident.num_trained / 1e6:.1f} M of them trained"
        total, usable = format_bytes(memory.total_bytes), format_bytes(memory.usable_bytes)
        each = " on each device" if way.num_devices > 1 else ""
        lines = [
            f"{way.model.published_as}, {resident.num_parameters / 1e9:.2f} G parameters{trained}",
            way.describe(),
            f"{total} of memory{each}, of which a micro-batch may take {usable}",
            "",
        ]
        if self.fits:
            more = " or more" if self.sizing.largest == MOST_SAMPLES else ""
            return [*lines, f"Largest micro-batch: {self.sizing.largest}{more}"]
        least, missing = format_bytes(self.sizing.least_bytes), format_bytes(self.missing_bytes)
        return [*lines, f"Does not fit: one sample takes {least}, {missing} more than there is."]

    def plan_table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows: how each effective batch size is reached."""
        rows = []
        for size in self.effective_batch_sizes:
            plan = self.sizing.plan(size)
            assert plan is not None
            counts = Counter(plan.microbatch_sizes)
            sizes = " + ".join(f"{count} × {samples}" for samples, count in counts.items())
            rows.append([str(size), str(plan.accumulation_steps), sizes])
        each = " of a device" if self.sizing.fine_tuning.num_devices > 1 else ""
        return ["effective batch size", "accumulation steps", f"micro-batches{each}"], rows

    def part_table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows: what the peak is made of."""
        parts = self.parts()
        resident, (phase, peak_bytes) = parts.resident, parts.peak
        per_sample, fixed = (
            format_bytes(n) for n in (parts.activation_bytes_per_sample, parts.fixed_activation_bytes)
        )
        samples = "one sample" if parts.microbatch_size == 1 else f"{parts.microbatch_size} samples"
        rows = [
            ("weights", resident.weight_bytes, ""),
            ("gradients", resident.gradient_bytes, ""),
            ("optimizer state", resident.optimizer_state_bytes, ""),
            (
                "activations",
                parts.activation_bytes,
                f"{per_sample} per sample, {fixed} whatever their number",
            ),
            ("peak", peak_bytes, f"in the {phase} phase"),
        ]
        if parts.key_value_cache_bytes is not None:
            cache = f"{format_bytes(parts.key_value_cache_bytes)} of it keys and values"
            rows.append(("peak of generation", parts.phase_peak_bytes["generation"], cache))
        return (
            [f"memory with {samples}", "takes", "of which"],
            [[name, format_bytes(num_bytes), note] for name, num_bytes, note in rows],
        )

    def describe_changes(self) -> str:
        """Return for people what the table of changes shows."""
        if len(self.changed[-1].changes) == 1:
            return "What would make it fit, one change at a time:"
        if not self.changed[-1].sizing.largest:
            return "Nothing makes it fit, neither one change at a time nor all together:"
        return "No change alone makes it fit; several together do:"

    def change_table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows: what was tried where it does not fit."""
        rows = []
        for changed in self.changed:
            sizing, plan = changed.sizing, changed.sizing.plan(self.target)
            least = format_bytes(sizing.least_bytes)
            rows.append(
                [
                    changed.name,
                    least if sizing.estimate is not None else f"at least {least}",
                    "does not fit" if plan is None else str(sizing.largest),
                    "" if plan is None else str(plan.accumulation_steps),
                    " ".join(change.option for change in changed.changes),
                ]
            )
        return ["change", "one sample takes", "micro-batch", f"steps for {self.target}", "options"], rows


def build_sizing(
    fine_tuning: FineTuning, resident: ResidentMemory, estimate: MemoryEstimate, memory: Memory
) -> Sizing:
    """Return how many samples fit at once, by the rules of a probe."""
    search = SearchPlan(limit=MOST_SAMPLES, budget_bytes=memory.budget_bytes, estimate=estimate)
    return Sizing(fine_tuning, resident, estimate, search.estimated_size(MOST_SAMPLES))


ResidentOf = Callable[[FineTuning], ResidentMemory]
EstimateOf = Callable[[FineTuning], MemoryEstimate]


def recommend(
    fine_tuning: FineTuning, memory: Memory, target: int, resident_of: ResidentOf, estimate_of: EstimateOf
) -> Recommendation:
    """Return what is recommended for one way to fine-tune with an effective batch size of `target`.

    Where not one sample fits, every change is tried alone, and where none of them is enough, more and more of
    them together, up to the first that fit. A way whose weights, gradients and optimizer state alone are too
    much is not estimated any further.

    Raises EstimateError where a way cannot be estimated.
    """

    def size(way: FineTuning) -> Sizing:
        resident = resident_of(way)
        if resident.total_bytes > memory.usable_bytes:
            return Sizing(way, resident, None, 0)
        return build_sizing(way, resident, estimate_of(way), memory)

    asked = build_sizing(fine_tuning, resident_of(fine_tuning), estimate_of(fine_tuning), memory)
    changed: list[ChangedSizing] = []
    if not asked.largest:
        alone = (change for kind in possible_changes(fine_tuning) for change in kind)
        changed += [ChangedSizing((change,), size(change.apply(fine_tuning))) for change in alone]
    if changed and not any(one.sizing.largest for one in changed):
        for together, way in _together(fine_tuning):
            changed.append(ChangedSizing(together, size(way)))
            if changed[-1].sizing.largest:
                break
    return Recommendation(memory, target, asked, tuple(changed))


def _together(fine_tuning: FineTuning) -> Iterator[tuple[tuple[Change, ...], FineTuning]]:
    """Yield two changes together, then three and so on; of each kind only its last stays."""
    made: tuple[Change, ...] = ()
    way = fine_tuning
    for kind in possible_changes(fine_tuning):
        useful = [change for change in kind if change.apply(way) != way]
        for change in useful:
            if made:
                yield (*made, change), change.apply(way)
        if useful:
            made, way = (*made, useful[-1]), useful[-1].apply(way)
