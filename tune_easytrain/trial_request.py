"""`TrialRequest`: what a trial asks the cluster for; trials of one sweep may differ. No Ray here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_easytrain.config import TrialConfig

ACCELERATOR_PREFIX = "accelerator_type:"
"""How the name of the resource begins by which Ray marks the nodes with a kind of GPU."""

_ACCELERATOR_AMOUNT = 0.001  # as Ray itself asks for one: a mark of the node, not something that is used up


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """What one trial asks for: `num_workers` times what one worker gets.

    Attributes:
        cpu: CPU cores.
        gpu: GPUs; below one a share of a GPU, and of its memory.
        accelerator_type: kind of GPU by Ray's name for it; None: any.
        custom: amounts of resources that the cluster defines, by name.
        num_workers: workers that train the trial together.
        shares_model: whether they have to share out the model, since it fits on no GPU.
    """

    cpu: float = 1.0
    gpu: float = 0.0
    accelerator_type: str | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    num_workers: int = 1
    shares_model: bool = False

    @classmethod
    def from_config(cls, trial: TrialConfig) -> TrialRequest:
        """Return what the section `trial` says; where it leaves the GPUs to us, that is none yet."""
        resources = trial.resources
        return cls(
            cpu=resources.cpu,
            gpu=0.0 if resources.gpu == "auto" else resources.gpu,
            accelerator_type=resources.accelerator_type,
            custom=resources.custom,
            num_workers=trial.num_workers,
        )

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray sets aside for one worker, by Ray's resource names."""
        bundle = {"CPU": self.cpu, **self.custom}
        if self.gpu:
            bundle["GPU"] = self.gpu
        if self.accelerator_type is not None:
            bundle[f"{ACCELERATOR_PREFIX}{self.accelerator_type}"] = _ACCELERATOR_AMOUNT
        return bundle

    def with_gpus(self, gpu: float, *, num_workers: int | None = None) -> TrialRequest:
        """Return the same with other GPUs; several workers then share out the model among them."""
        if num_workers is None:
            return replace(self, gpu=gpu)
        return replace(self, gpu=gpu, num_workers=num_workers, shares_model=True)


@dataclass(frozen=True, slots=True)
class TrialRequests:
    """The requests of a sweep's trials: of some by their grid point, of all others the same one."""

    default: TrialRequest
    by_point: Mapping[str, TrialRequest] = field(default_factory=dict)

    @classmethod
    def of_points(
        cls, default: TrialRequest, points: Sequence[Sequence[Any]], requests: Sequence[TrialRequest]
    ) -> TrialRequests:
        """Return the requests of grid points, one each."""
        return cls(default, dict(zip(map(_key, points), requests, strict=True)))

    def of(self, point: Sequence[Any]) -> TrialRequest:
        """Return the request of the trial at a grid point; a list will do: Ray restores tuples as lists."""
        return self.by_point.get(_key(point), self.default)

    @property
    def all(self) -> list[TrialRequest]:
        """Every trial's request, where they are known by trial; otherwise the one of all."""
        return [*self.by_point.values()] or [self.default]


def _key(point: Sequence[Any]) -> str:
    return json.dumps(list(point), sort_keys=True, default=repr)
