"""Several workers of one trial, on a Ray actor per rank. No torch.

They agree on the smallest limit; when one of them fails or is gone, the others are ended with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from tune_easytrain.child_process import RemoteError
from tune_easytrain.errors import EstimateError
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
from tune_easytrain.trial_children import TrainingProcess
from tune_easytrain.worker_actor import Answer, WorkerActors, get_all

_KILL_WAIT_SECONDS = 15.0
_LOST_PEER_SECONDS = 5.0
"""How long one waits for what really happened, where a rank fails since another one is gone."""

_LOST_PEER = re.compile(r"(closed|reset) by peer|broken pipe|\bgloo\b|nccl|tcpstore", re.IGNORECASE)
_SMALLER_HELPS = (Outcome.OUT_OF_MEMORY, Outcome.SIZE_LIMIT)


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
        (_, host), _ = get_all([self._actors[0].place.remote(), self._actors[0].forget_ports.remote()])
        place = WorkerPlace(0, num_workers, host)
        calls = {self._actors[0].attempt.remote(microbatch_size, timeout_seconds, place): 0}
        (port,) = get_all([self._actors[0].port.remote()])
        for rank, actor in enumerate(self._actors[1:] if port is not None else [], start=1):
            place = WorkerPlace(rank, num_workers, host, port)
            calls[actor.attempt.remote(microbatch_size, timeout_seconds, place)] = rank
        answers = self._settle(calls)
        attempts: list[Attempt] = [answer.value for answer in answers if answer.error is None]
        if all(attempt.ran for attempt in attempts) and len(attempts) == len(answers):
            return attempts
        self._call("kill")  # a group that has lost a rank is of no use
        limits = [attempt for attempt in attempts if attempt.outcome in _SMALLER_HELPS]
        errors = [answer.error for answer in answers if answer.error is not None]
        causes = [error for error in errors if not _is_lost_peer(error)]
        if limits or not errors:
            return limits or attempts
        raise (causes or errors)[0].exception()

    def _settle(self, calls: dict[Any, int]) -> list[Answer]:
        """Wait for the ranks' answers; after a failure for a moment only, since they wait for each other."""
        answers: list[Answer] = []
        wait_seconds: float | None = None
        while calls:
            done, _ = ray.wait(list(calls), num_returns=1, timeout=wait_seconds)
            if not done:
                get_all([self._actors[rank].call.remote("kill") for rank in calls.values()])
                break
            answer: Answer = get_all(done)[0]
            del calls[done[0]]
            answers.append(answer)
            if answer.error is not None or not answer.value.ran:
                wait_seconds = _LOST_PEER_SECONDS
        return answers

    def for_training(self) -> TrainingProcess:
        """Return what trains on all ranks together."""
        self._begin()
        if self._training is None:
            copies_to = Path(self._opening.scratch_dir) if self._are_elsewhere[0] else None
            self._training = _Training(self._actors, copies_to)
        return self._training

    def terminate(self, wait_seconds: float = 0.0) -> None:
        """Do nothing: one rank cannot store what all have, and they go on from the last report."""

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
            node_id != own_node for node_id, _ in get_all([actor.place.remote() for actor in self._actors])
        ]
        if path is not None and any(self._are_elsewhere):
            content = ray.put(Path(path).read_bytes())
        get_all(
            [
                actor.begin.remote(self._opening, content if is_elsewhere else None)
                for actor, is_elsewhere in zip(self._actors, self._are_elsewhere, strict=True)
            ]
        )
        self._has_begun = True

    def _call(self, method: str, *args: Any, ranks: Sequence[int] | None = None) -> list[Any]:
        actors = self._actors if ranks is None else [self._actors[rank] for rank in ranks]
        return [answer.result() for answer in get_all([actor.call.remote(method, *args) for actor in actors])]


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
        ((_, host),) = get_all([self._actors[0].place.remote()])
        request = replace(message, place=WorkerPlace(0, num_workers, host))
        (answer,) = get_all([self._actors[0].train.remote(request)])
        opened = answer.result()
        assert isinstance(opened, StoreOpened)
        self._wait_for(0, self._actors[0].next_message.remote(False))
        for rank, actor in enumerate(self._actors[1:], start=1):
            place = WorkerPlace(rank, num_workers, host, opened.port)
            self._wait_for(rank, actor.train.remote(replace(message, place=place)))

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """Return the next report, change of plan, or the end of all ranks' training."""
        while True:
            done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=timeout_seconds)
            if not done:
                raise TimeoutError(f"no answer from the trial's workers in {timeout_seconds:g} s")
            rank = self._waiting.pop(done[0])
            message = self._cause(get_all(done)[0]).result()
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

    def stack(self) -> str:
        """Return nothing: the ranks wait for each other, so most stacks would say no more than that."""
        return ""

    def _cause(self, answer: Answer) -> Answer:
        """Return of the errors of all ranks the one that the others come from: those have lost a rank."""
        if answer.error is None or not _is_lost_peer(answer.error) or not self._waiting:
            return answer
        waiting = list(self._waiting)
        done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_LOST_PEER_SECONDS)
        others: list[Answer] = get_all(done)
        causes = [other for other in others if other.error is not None and not _is_lost_peer(other.error)]
        return causes[0] if causes else answer

    def _with_checkpoint_here(self, report: Report) -> Report:
        if report.checkpoint_path is None or self._copies_to is None:
            return report
        (content,) = get_all([self._actors[0].read_file.remote(report.checkpoint_path)])
        path = self._copies_to / "checkpoint.pt"
        path.write_bytes(content)
        return replace(report, checkpoint_path=str(path))

    def _wait_for(self, rank: int, call: Any) -> None:
        self._waiting[call] = rank


def _is_lost_peer(error: RemoteError) -> bool:
    """Return whether an error says no more than that another rank is gone."""
    return _LOST_PEER.search(error.message) is not None
