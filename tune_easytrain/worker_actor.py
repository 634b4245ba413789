"""The Ray actor of one rank of a trial, with children of its own. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from tune_easytrain.errors import WorkerLostError
from tune_easytrain.protocol import Continue, Opening, TrainRequest, WorkerPlace
from tune_easytrain.scratch import ScratchFolder
from tune_easytrain.trial_children import TrainingProcess, TrialChildren


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker answers: a value, or the error that its child or its own code raised."""

    value: Any = None
    error: RemoteError | None = None

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Answer:
        """Return what `work` returns or raises."""
        try:
            return cls(work())
        except Exception as error:  # noqa: BLE001 -- the trial raises it again
            return cls(error=RemoteError.from_exception(error))

    def result(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error.exception()
        return self.value


class Worker:
    """The actor itself. Two of its methods may run at a time, so that it can be ended while it waits."""

    def __init__(self, rank: int, bundle: Mapping[str, float], preloaded_modules: Sequence[str]) -> None:
        self._rank, self._bundle, self._preloaded_modules = rank, bundle, preloaded_modules
        self._children: TrialChildren | None = None
        self._training: TrainingProcess | None = None
        self._scratch: ScratchFolder | None = None
        self._ports: SimpleQueue[int | None] = SimpleQueue()

    def place(self) -> tuple[str, str]:
        """Return the id and the address of the node this worker is on."""
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return ray.get_runtime_context().get_node_id(), address

    def begin(self, opening: Opening, checkpoint: bytes | None) -> None:
        """Take over a trial; `checkpoint` is its content where this node does not have the file."""
        self.end()
        self._scratch = ScratchFolder()
        path = opening.checkpoint_path
        if checkpoint is not None:
            path = str(self._scratch.path / "resumed.pt")
            Path(path).write_bytes(checkpoint)
        share = opening.device_share
        if not self._bundle.get("GPU"):
            share = 1.0 / trials_per_node(self._bundle, ray.get_runtime_context().get_node_id())
        opening = replace(
            opening,
            checkpoint_path=path,
            scratch_dir=str(self._scratch.path),
            device_share=share,
            rank=self._rank,
            is_shared=opening.is_shared and self._rank == 0,
        )
        self._children = TrialChildren(opening, self._preloaded_modules)

    def call(self, method: str, *args: Any) -> Answer:
        """Call a method of this rank's children."""
        return Answer.of(lambda: getattr(self._children, method)(*args))

    def train(self, request: TrainRequest) -> Answer:
        """Begin to train, and return the first message."""
        children = self._children
        assert children is not None

        def begin() -> Any:
            self._training = children.for_training()
            self._training.send(request)
            return self._training.receive()

        return Answer.of(begin)

    def attempt(self, microbatch_size: int, timeout_seconds: float, place: WorkerPlace) -> Answer:
        """Try a size together with the other ranks' children."""
        children, tell_port = self._children, self._ports.put
        assert children is not None
        answer = Answer.of(lambda: children.attempt(microbatch_size, timeout_seconds, place, tell_port))
        if place.port is None:
            tell_port(None)  # for one who waits for a port that does not come
        return answer

    def port(self) -> int | None:
        """Return the port of the store that this rank's child opens to try; None where it opens none."""
        return self._ports.get()

    def next_message(self, goes_on: bool) -> Answer:
        """Let training go on where it waits, and return the next message."""
        training = self._training
        assert training is not None

        def go_on() -> Any:
            if goes_on:
                training.send(Continue())
            return training.receive()

        return Answer.of(go_on)

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
        if self._scratch is not None:
            self._scratch.remove()
        self._children, self._training, self._scratch = None, None, None


class WorkerActors:
    """The actors of a trial's workers, made when first needed and again after one was lost.

    They live in the trial's own placement group, and go from trial to trial with it.
    """

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


def get_all(calls: Sequence[Any]) -> list[Any]:
    """Return what the calls of actors return.

    Raises:
        WorkerLostError: One of the actors is gone.
    """
    try:
        values: list[Any] = ray.get(list(calls))
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkerLostError(f"a worker of the trial is gone: {reason}") from None
    return values
