"""Estimates made by hand, for tests of what is done with one."""

from __future__ import annotations

from dataclasses import dataclass

from tune_easytrain.memory_estimate import MemoryEstimate

GIB = 2**30


@dataclass(frozen=True)
class LinearEstimate(MemoryEstimate):
    """`fixed_gib` + `gib_per_sample` × m in the backward pass, `fixed_gib` in the optimizer."""

    fixed_gib: float
    gib_per_sample: float

    def phase_peak_bytes(self, microbatch_size: int) -> dict[str, int]:
        backward = self.fixed_gib + self.gib_per_sample * microbatch_size
        return {"backward": round(backward * GIB), "optimizer": round(self.fixed_gib * GIB)}


def make_estimate(fixed_gib: float, gib_per_sample: float, **missing: str) -> MemoryEstimate:
    return LinearEstimate((), "cuda", fixed_gib, gib_per_sample, missing=missing)
