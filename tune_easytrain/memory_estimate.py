"""`MemoryEstimate`: a trial's peak memory at any micro-batch size, as lines in that size. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_SIZES_LOOKED_AT = tuple(sorted({round(2 ** (quarter / 4)) for quarter in range(4 * 16 + 1)}))
"""Up to 65536, each a fifth more than the one before: a moment highest only between two is hardly higher."""

_ALLOWANCES = {"cuda": 1.005, "cpu": 1.06}
"""What an allocator's blocks are larger than their tensors, as a factor on the estimate. Measured: hardly at
all by CUDA's allocator with segments that grow, 0.91 to 1.06 by malloc under a cap, where most nets are
small."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes in use at one moment: `fixed_bytes + bytes_per_sample × m`."""

    fixed_bytes: float
    bytes_per_sample: float

    def at(self, microbatch_size: int) -> float:
        """Return the bytes at one micro-batch size."""
        return self.fixed_bytes + self.bytes_per_sample * microbatch_size


@dataclass(frozen=True, slots=True)
class BoundedMoment:
    """A moment at which a kernel takes scratch memory: it grows with the size up to `most_bytes`."""

    live: Line
    scratch: Line
    most_bytes: float

    def at(self, microbatch_size: int) -> float:
        """Return the bytes at one micro-batch size."""
        return self.live.at(microbatch_size) + min(self.scratch.at(microbatch_size), self.most_bytes)


@dataclass(frozen=True, slots=True)
class PhaseEstimate:
    """One phase of training: forward, backward, optimizer, evaluation or generation.

    Attributes:
        name: the phase.
        tensor_lines: the upper envelope of the moments' lines, tensors alone.
        moments: the moments at which kernels take more than their tensors and that are highest somewhere.
        fixed_bytes: what is in use all the time and belongs to no tensor.
    """

    name: str
    tensor_lines: tuple[Line, ...]
    moments: tuple[BoundedMoment, ...]
    fixed_bytes: int

    @classmethod
    def build(
        cls, name: str, lines: Iterable[Line], moments: Iterable[BoundedMoment], fixed_bytes: int
    ) -> PhaseEstimate:
        """Keep of all moments those that can be the peak of the phase."""
        return cls(name, upper_envelope(lines), _highest(tuple(moments)), fixed_bytes)

    def peak_bytes(self, microbatch_size: int) -> int:
        """Return the phase's peak at one micro-batch size, in bytes."""
        tensors = self.tensor_bytes(microbatch_size) + self.fixed_bytes
        return math.ceil(max(tensors, *(moment.at(microbatch_size) for moment in self.moments), 0.0))

    def tensor_bytes(self, microbatch_size: int) -> int:
        """Return the bytes of tensors alone at the phase's peak: what no kernel can do without."""
        return math.ceil(max(line.at(microbatch_size) for line in self.tensor_lines))


@dataclass(frozen=True, slots=True)
class Segment:
    """The phases for micro-batch sizes up to `largest_microbatch` (None: for all sizes)."""

    largest_microbatch: int | None
    phases: tuple[PhaseEstimate, ...]


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of one trial at any micro-batch size, context and other processes left out.

    It errs on the high side: the real peak is expected between `tensor_bytes(m)` and `peak_bytes(m)`.

    Attributes:
        segments: by rising size; more than one only where a task does other operations at other sizes.
        device_type: whose kernels were assumed, `cuda` or `cpu`.
        missing: phases after training (evaluation, generation) that could not be traced, each with the
            reason. The peak is that of the others; the probe runs all of them.
        flops_per_sample: floating-point operations of matrix products and convolutions, forward and
            backward, with what is computed twice.
    """

    segments: tuple[Segment, ...]
    device_type: str
    missing: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    flops_per_sample: float = field(default=0.0, kw_only=True)

    def peak_bytes(self, microbatch_size: int) -> int:
        """Return the peak over all phases, in bytes; raises ValueError below one sample."""
        return max(self.phase_peak_bytes(microbatch_size).values())

    def phase_peak_bytes(self, microbatch_size: int) -> dict[str, int]:
        """Return the peak of each phase, in bytes."""
        return {
            phase.name: math.ceil(_ALLOWANCES[self.device_type] * phase.peak_bytes(microbatch_size))
            for phase in self._phases(microbatch_size)
        }

    def tensor_bytes(self, microbatch_size: int) -> int:
        """Return the peak of tensors alone, in bytes: the real peak is not below it."""
        return max(phase.tensor_bytes(microbatch_size) for phase in self._phases(microbatch_size))

    def largest_microbatch(self, budget_bytes: int, limit: int, *, ratio: float = 1.0) -> int:
        """Return the largest size up to `limit` whose peak times `ratio` is within the budget, or 0."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak_bytes(middle) * ratio <= budget_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _phases(self, microbatch_size: int) -> tuple[PhaseEstimate, ...]:
        if microbatch_size < 1:
            raise ValueError(f"microbatch_size must be at least 1, got {microbatch_size}")
        for segment in self.segments:
            if segment.largest_microbatch is None or microbatch_size <= segment.largest_microbatch:
                return segment.phases
        return self.segments[-1].phases


def _highest(moments: tuple[BoundedMoment, ...]) -> tuple[BoundedMoment, ...]:
    """Return the moments that are highest at one of the sizes looked at."""
    if not moments:
        return ()
    distinct = tuple(dict.fromkeys(moments))
    return tuple(dict.fromkeys(max(distinct, key=lambda m: m.at(size)) for size in _SIZES_LOOKED_AT))


def upper_envelope(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Return the lines that are highest somewhere at m ≥ 1, by rising slope."""
    best: dict[float, Line] = {}
    for line in lines:
        known = best.get(line.bytes_per_sample)
        if known is None or line.fixed_bytes > known.fixed_bytes:
            best[line.bytes_per_sample] = line
    hull: list[Line] = []
    for line in sorted(best.values(), key=lambda item: item.bytes_per_sample):
        while hull and (hull[-1].at(1) <= line.at(1) or _is_hidden(hull, line)):
            hull.pop()
        hull.append(line)
    return tuple(hull)


def _is_hidden(hull: list[Line], line: Line) -> bool:
    """Whether the last line of the hull is nowhere above both its neighbours."""
    if len(hull) < 2:
        return False
    before, last = hull[-2], hull[-1]
    return _crossing(before, line) <= _crossing(before, last)


def _crossing(flat: Line, steep: Line) -> float:
    return (flat.fixed_bytes - steep.fixed_bytes) / (steep.bytes_per_sample - flat.bytes_per_sample)
