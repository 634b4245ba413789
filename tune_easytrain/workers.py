"""Several workers of one trial: one Ray actor per rank, each with children of its own. No torch.

The actors live in the trial's own placement group and go from trial to trial with it. They agree on the
smallest limit; when one of them fails or is gone, the others are ended with it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune_easytrain.child_process import RemoteError
from tune_easytrain.cluster import trials_per_node
from tune_easytrain.errors import ChildDiedError, EstimateError
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.protocol import (
    Continue,
    Finished,
    Opened,
    Opening,
    PlanChanged,
    Report,
    StoreOpened,
    TrainRequest,
    WorkerPlace,
)
from tune_easytrain.trial_children import TrainingProcess, TrialChildren

_KILL_WAIT_SECONDS = 15.0
_LOST_PEER_SECONDS = 5.0
"""How long one waits for what really happened, where a rank fails since another one is gone."""

_LOST_PEER = re.compile(r"(closed|reset) by peer|broken pipe|\bgloo\b|nccl|tcpstore", re.IGNORECASE)
_SMALLER_HELPS = (Outcome.OUT_OF_MEMORY, Outcome.SIZE_LIMIT)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a worker answers: a value, or the error that its child or its own code raised."""

    value: Any = None
    error: RemoteError | None = None


class Worker:
    """The actor of one rank. Two of its methods may run at a time, so that it can be ended while it waits."""

    def __init__(self, rank: int, bundle: Mapping[str, float], preloaded_modules: Sequence[str]) -> None:
        self._rank, self._bundle, self._preloaded_modules = rank, bundle, preloaded_modules
        self._children: TrialChildren | None = None
        self._training: TrainingProcess | None = None
        self._scratch_dir: str | None = None
        self._ports: SimpleQueue[int | None] = SimpleQueue()

    def place(self) -> tuple[str, str]:
        """Return the id and the address of the node this worker is on."""
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return ray.get_runtime_context().get_node_id(), address

    def begin(self, opening: Opening, checkpoint: bytes | None) -> None:
        """Take over a trial; `checkpoint` is its content where this node does not have the file."""
        self.end()
        self._scratch_dir = tempfile.mkdtemp(prefix="tune_easytrain_worker_")
        path = opening.checkpoint_path
        if checkpoint is not None:
            path = str(Path(self._scratch_dir) / "resumed.pt")
            Path(path).write_bytes(checkpoint)
        share = opening.device_share
        if not self._bundle.get("GPU"):
            share = 1.0 / trials_per_node(self._bundle, ray.get_runtime_context().get_node_id())
        opening = replace(
            opening,
            checkpoint_path=path,
            scratch_dir=self._scratch_dir,
            device_share=share,
            rank=self._rank,
            is_shared=opening.is_shared and self._rank == 0,
        )
        self._children = TrialChildren(opening, self._preloaded_modules)

    def call(self, method: str, *args: Any) -> _Told:
        """Call a method of this rank's children."""
        try:
            return _Told(getattr(self._children, method)(*args))
        except Exception as error:  # noqa: BLE001 -- the trial raises it again
            return _Told(error=RemoteError.from_exception(error))

    def train(self, request: TrainRequest) -> _Told:
        """Begin to train, and return the first message."""
        assert self._children is not None
        try:
            self._training = self._children.for_training()
            self._training.send(request)
        except Exception as error:  # noqa: BLE001 -- the trial raises it again
            return _Told(error=RemoteError.from_exception(error))
        return self.next_message(False)

    def attempt(self, microbatch_size: int, timeout_seconds: float, place: WorkerPlace) -> _Told:
        """Try a size together with the other ranks' children."""
        assert self._children is not None
        try:
            return _Told(self._children.attempt(microbatch_size, timeout_seconds, place, self._ports.put))
        except Exception as error:  # noqa: BLE001 -- the trial raises it again
            return _Told(error=RemoteError.from_exception(error))
        finally:
            if place.store_address is None:
                self._ports.put(None)  # for one who waits for a port that does not come

    def port(self) -> int | None:
        """Return the port of the store that this rank's child opens to try; None where it opens none."""
        return self._ports.get()

    def next_message(self, goes_on: bool) -> _Told:
        """Let training go on where it waits, and return the next message."""
        assert self._training is not None
        try:
            if goes_on:
                self._training.send(Continue())
            return _Told(self._training.receive())
        except Exception as error:  # noqa: BLE001 -- the trial raises it again
            return _Told(error=RemoteError.from_exception(error))

    def forget_ports(self) -> None:
        """Forget the ports of attempts before."""
        self._ports = SimpleQueue()

    def read_file(self, path: str) -> bytes:
        """Return a file's content, for a trial on another node."""
        return Path(path).read_bytes()

    def end(self) -> None:
        """End the trial's children and forget it."""
        if self._children is not None:
            self._children.kill()
        if self._scratch_dir is not None:
            shutil.rmtree(self._scratch_dir, ignore_errors=True)
        self._children, self._training, self._scratch_dir = None, None, None


class WorkerActors:
    """The actors of a trial's workers, made when first needed and again after one was lost."""

    def __init__(
        self, num_workers: int, bundle: Mapping[str, float], preloaded_modules: Sequence[str]
    ) -> None:
        self._num_workers, self._bundle, self._preloaded_modules = num_workers, bundle, preloaded_modules
        self._actors: list[Any] = []

    def get(self) -> list[Any]:
        """Return an actor per rank; each has its own bundle of the placement group this process is in."""
        if not self._actors:
            group = get_current_placement_group()
            assert group is not None, "a trial of several workers has a placement group"
            actor: Any = ray.remote(Worker)
            custom = {name: amount for name, amount in self._bundle.items() if name not in ("CPU", "GPU")}
            self._actors = [
                actor.options(
                    num_cpus=self._bundle.get("CPU", 0.0),
                    num_gpus=self._bundle.get("GPU", 0.0),
                    resources=custom,
                    max_concurrency=2,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=group, placement_group_bundle_index=rank
                    ),
                ).remote(rank, self._bundle, self._preloaded_modules)
                for rank in range(self._num_workers)
            ]
        return self._actors

    def kill(self) -> None:
        """End every actor, and with it whatever its children hold."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class WorkerProcesses:
    """The processes of a trial of several workers, as `TrialProcesses`.

    A size fits where it fits on every rank. Each rank tries by itself, so that none waits for another.
    """

    def __init__(self, opening: Opening, actors: WorkerActors) -> None:
        self._opening, self._owner = opening, actors
        self._actors = actors.get()
        self._training: _Training | None = None
        self._has_begun = False
        self._are_elsewhere: list[bool] = []

    def open(self) -> Opened:
        """Have every rank build the task; the smallest budget is that of the trial."""
        self._begin()
        opened: list[Opened] = self._call("open")
        first = opened[0]
        return replace(first, budget_bytes=min(each.budget_bytes for each in opened))

    def estimate(self) -> MemoryEstimate | EstimateError:
        """Return what rank 0 works out."""
        self._begin()
        (found,) = self._call("estimate", ranks=[0])
        estimate: MemoryEstimate | EstimateError = found
        return estimate

    def attempt(self, microbatch_size: int, timeout_seconds: float) -> Attempt:
        """Try one size on every rank at once; the worst of the outcomes counts, and the highest peak.

        The ranks of a sharded model try together. What fails on one ends the others, that wait for it.
        """
        if self._opening.settings.sharding == "full":
            attempts = self._attempt_together(microbatch_size, timeout_seconds)
        else:
            attempts = self._call("attempt", microbatch_size, timeout_seconds)
        worst = min(attempts, key=lambda attempt: (attempt.ran, attempt.outcome == "fits"))
        peaks = [attempt.peak_bytes for attempt in attempts if attempt.peak_bytes is not None]
        seconds = max(attempt.seconds for attempt in attempts)
        return replace(worst, peak_bytes=max(peaks, default=None), seconds=seconds)

    def _attempt_together(self, microbatch_size: int, timeout_seconds: float) -> list[Attempt]:
        num_workers = len(self._actors)
        (_, host), _ = _get([self._actors[0].place.remote(), self._actors[0].forget_ports.remote()])
        calls = {
            self._actors[0].attempt.remote(microbatch_size, timeout_seconds, WorkerPlace(0, num_workers)): 0
        }
        (port,) = _get([self._actors[0].port.remote()])
        for rank, actor in enumerate(self._actors[1:] if port is not None else [], start=1):
            place = WorkerPlace(rank, num_workers, (host, port))
            calls[actor.attempt.remote(microbatch_size, timeout_seconds, place)] = rank
        answers = self._settle(calls)
        attempts: list[Attempt] = [told.value for told in answers if told.error is None]
        if all(attempt.ran for attempt in attempts) and len(attempts) == len(answers):
            return attempts
        self._call("kill")  # a group that has lost a rank is of no use
        limits = [attempt for attempt in attempts if attempt.outcome in _SMALLER_HELPS]
        errors = [told.error for told in answers if told.error is not None]
        causes = [error for error in errors if not _is_lost_peer(error)]
        if limits or not errors:
            return limits or attempts
        raise (causes or errors)[0].exception()

    def _settle(self, calls: dict[Any, int]) -> list[_Told]:
        """Wait for the ranks' answers; after a failure for a moment only, since they wait for each other."""
        answers: list[_Told] = []
        wait_seconds: float | None = None
        while calls:
            done, _ = ray.wait(list(calls), num_returns=1, timeout=wait_seconds)
            if not done:
                _get([self._actors[rank].call.remote("kill") for rank in calls.values()])
                break
            told: _Told = _get(done)[0]
            del calls[done[0]]
            answers.append(told)
            if told.error is not None or not told.value.ran:
                wait_seconds = _LOST_PEER_SECONDS
        return answers

    def for_training(self) -> TrainingProcess:
        """Return what trains on all ranks together."""
        self._begin()
        if self._training is None:
            copies_to = Path(self._opening.scratch_dir) if self._are_elsewhere[0] else None
            self._training = _Training(self._actors, copies_to)
        return self._training

    def kill(self) -> None:
        """End the children of every rank; the actors stay for the next trial, unless one does not answer."""
        try:
            ray.get([actor.end.remote() for actor in self._actors], timeout=_KILL_WAIT_SECONDS)
        except (RayError, TimeoutError):
            self._owner.kill()

    def _begin(self) -> None:
        if self._has_begun:
            return
        own_node = ray.get_runtime_context().get_node_id()
        path, content = self._opening.checkpoint_path, None
        self._are_elsewhere = [
            node_id != own_node for node_id, _ in _get([actor.place.remote() for actor in self._actors])
        ]
        if path is not None and any(self._are_elsewhere):
            content = ray.put(Path(path).read_bytes())
        _get(
            [
                actor.begin.remote(self._opening, content if is_elsewhere else None)
                for actor, is_elsewhere in zip(self._actors, self._are_elsewhere, strict=True)
            ]
        )
        self._has_begun = True

    def _call(self, method: str, *args: Any, ranks: Sequence[int] | None = None) -> list[Any]:
        actors = self._actors if ranks is None else [self._actors[rank] for rank in ranks]
        return [_value(told) for told in _get([actor.call.remote(method, *args) for actor in actors])]


class _Training:
    """The training of all ranks, as one process: rank 0 reports, and any rank may fail or change its plan."""

    def __init__(self, actors: Sequence[Any], copies_to: Path | None) -> None:
        """`copies_to` is a folder of this node, where rank 0 saves its checkpoints on another one."""
        self._actors, self._copies_to = actors, copies_to
        self._waiting: dict[Any, int] = {}
        self._finished: set[int] = set()

    def send(self, message: Any) -> None:
        """Begin to train, or let rank 0 go on after its report."""
        if isinstance(message, Continue):
            self._wait_for(0, self._actors[0].next_message.remote(True))
            return
        assert isinstance(message, TrainRequest)
        num_workers = len(self._actors)
        request = replace(message, place=WorkerPlace(0, num_workers))
        first = self._actors[0].train.remote(request)
        (_, host), told = _get([self._actors[0].place.remote(), first])
        opened = _value(told)
        assert isinstance(opened, StoreOpened)
        self._wait_for(0, self._actors[0].next_message.remote(False))
        for rank, actor in enumerate(self._actors[1:], start=1):
            place = WorkerPlace(rank, num_workers, (host, opened.port))
            self._wait_for(rank, actor.train.remote(replace(message, place=place)))

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """Return the next report, change of plan, or the end of all ranks' training."""
        while True:
            done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=timeout_seconds)
            if not done:
                raise TimeoutError(f"no answer from the trial's workers in {timeout_seconds:g} s")
            rank = self._waiting.pop(done[0])
            message = _value(self._cause(_get(done)[0]))
            if isinstance(message, Finished):
                self._finished.add(rank)
                if len(self._finished) == len(self._actors):
                    return message
                continue
            if isinstance(message, Report):
                return self._with_checkpoint_here(message)
            assert isinstance(message, PlanChanged)
            self._wait_for(rank, self._actors[rank].next_message.remote(False))
            return message

    def _cause(self, told: _Told) -> _Told:
        """Return of the errors of all ranks the one that the others come from: those have lost a rank."""
        if told.error is None or not _is_lost_peer(told.error) or not self._waiting:
            return told
        waiting = list(self._waiting)
        done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_LOST_PEER_SECONDS)
        others: list[_Told] = _get(done)
        causes = [other for other in others if other.error is not None and not _is_lost_peer(other.error)]
        return causes[0] if causes else told

    def _with_checkpoint_here(self, report: Report) -> Report:
        if report.checkpoint_path is None or self._copies_to is None:
            return report
        (content,) = _get([self._actors[0].read_file.remote(report.checkpoint_path)])
        path = self._copies_to / "checkpoint.pt"
        path.write_bytes(content)
        return replace(report, checkpoint_path=str(path))

    def _wait_for(self, rank: int, call: Any) -> None:
        self._waiting[call] = rank


def _is_lost_peer(error: RemoteError) -> bool:
    """Return whether an error says no more than that another rank is gone."""
    return _LOST_PEER.search(error.message) is not None


def _get(calls: Sequence[Any]) -> list[Any]:
    try:
        values: list[Any] = ray.get(list(calls))
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ChildDiedError(f"a worker of the trial is gone: {reason}") from None
    return values


def _value(told: _Told) -> Any:
    if told.error is not None:
        raise told.error.exception()
    return told.value
