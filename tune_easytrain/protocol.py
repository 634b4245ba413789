"""The messages between a trial and its child process on the device. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.exactness import BatchCoupling
from tune_easytrain.probe import Attempt
from tune_easytrain.settings import TrialSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Everything a child needs to know of its trial.

    Attributes:
        task_payload: `build_task`, pickled by value; None where the trial has no task.
        function_payload: the user's own training function, pickled by value; None: the default loop.
        config: the trial's nested config.
        device: `cuda` or `cpu`; `auto` is a GPU where there is one.
        device_share: this trial's share of the device's memory, 0 to 1.
        num_threads: torch's threads on the CPU.
        scratch_dir: a folder of the trial's own for checkpoints on their way to storage.
        checkpoint_path: the checkpoint to go on from.
        budget_bytes: the memory budget found by an earlier child of this trial.
        rank: this worker's number among those that train the trial together, from 0.
        is_shared: whether other trials may ask for what this one finds, so that it needs a signature.
        grace_seconds: how long the child may take to end when it is told to.
        store: where it stores a checkpoint then; None: nowhere.
    """

    task_payload: bytes | None
    function_payload: bytes | None
    config: dict[str, Any]
    settings: TrialSettings
    device: str
    device_share: float
    num_threads: int
    scratch_dir: str
    checkpoint_path: str | None = None
    budget_bytes: int | None = None
    rank: int = 0
    is_shared: bool = True
    grace_seconds: float = 30.0
    store: CheckpointStore | None = None


@dataclass(frozen=True, slots=True)
class EstimateRequest:
    """Ask a child for the estimate of a trial's memory; it answers and ends, and touches no device."""

    opening: Opening


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """Ask a child whether a trial's task and its data can be used; it answers with what is wrong, and ends.

    `task_payload` is `build_task`, pickled by value, `config` the nested config of the trial.
    """

    task_payload: bytes
    config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The child's first message.

    `budget_bytes` is what the child is capped at. `num_train_samples` is None without a task, `metric_names`
    None where a function of the user's own reports whatever it likes. `signature` is the same for trials
    that need the same memory; empty where nothing is probed. `coupling` is what lets the samples of a batch
    depend on one another. A trial's first child gives both. `longest_tokens` is the length of the longest
    training sample, where micro-batches are limited by tokens.
    """

    device_name: str
    budget_bytes: int
    num_train_samples: int | None
    metric_names: tuple[str, ...] | None
    resumed_microbatch_limit: int | None
    signature: str = ""
    coupling: BatchCoupling | None = None
    longest_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """One worker's place among those that train a trial together.

    `host` is the address of the worker of rank 0, which keeps what they need to find each other, and `port`
    where it listens there; None for that worker itself, which opens the store and tells its port.
    """

    rank: int
    num_workers: int
    host: str
    port: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptRequest:
    """Ask the child to try one micro-batch size; it answers with an `AttemptReply`.

    With `place` it tries as one of several workers together, and the first one opens their store before.
    """

    microbatch_size: int
    place: WorkerPlace | None = None


@dataclass(frozen=True, slots=True)
class AttemptReply:
    """An attempt's result, and whether the child's memory is back where it was before."""

    attempt: Attempt
    is_clean: bool


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """Ask the child to train with at most this many samples at once; with `place`, as one of several."""

    microbatch_limit: int | None
    place: WorkerPlace | None = None


@dataclass(frozen=True, slots=True)
class StoreOpened:
    """The worker of rank 0 waits for the others at this port of its node."""

    port: int


@dataclass(frozen=True, slots=True)
class Report:
    """Metrics of one epoch (or of one report of the user's own function).

    `checkpoint_path` is a file in the scratch folder, or None; `checkpoint_error` is why there is none where
    there should be one. `is_final` says that nothing follows, and `reason` why. The child waits for a
    `Continue` before it goes on.
    """

    metrics: dict[str, float]
    peak_memory_bytes: int
    checkpoint_path: str | None = None
    is_final: bool = False
    reason: str = ""
    checkpoint_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChanged:
    """The child trains with another batch plan from now on; it waits for no answer.

    `failed_microbatch_size` is the size at which memory ran out, with the first line of the error in
    `message`; None where the new plan is merely faster, or the one that a resumed trial had.
    """

    microbatch_limit: int
    microbatch_size: int
    accumulation_steps: int
    failed_microbatch_size: int | None = None
    message: str = ""

    @classmethod
    def to(
        cls, plan: BatchPlan, *, failed_microbatch_size: int | None = None, message: str = ""
    ) -> PlanChanged:
        """Describe the change to `plan`."""
        return cls(
            microbatch_limit=plan.microbatch_limit,
            microbatch_size=plan.microbatch_size,
            accumulation_steps=plan.accumulation_steps,
            failed_microbatch_size=failed_microbatch_size,
            message=message,
        )


@dataclass(frozen=True, slots=True)
class Continue:
    """The report has been taken; go on."""


@dataclass(frozen=True, slots=True)
class Terminated:
    """The child was told to end, and ends; `lost` says why what it had done is not stored, if it is not."""

    lost: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The training function has returned."""
