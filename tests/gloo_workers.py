"""Several workers of one trial without Ray: real processes that meet over gloo, on GPUs over NCCL."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch

from tune_easytrain.child_process import RemoteError, forkserver_context
from tune_easytrain.protocol import WorkerPlace
from tune_easytrain.rank_group import RankGroup

CPU = torch.device("cpu")


def on_ranks(work: Callable[[RankGroup], Any], num_workers: int = 2, device: torch.device = CPU) -> list[Any]:
    """What `work` returns on each of several ranks; what one of them raises is raised here, and ends all.

    On `cuda` each rank sees a GPU of its own.
    """
    context = forkserver_context()
    port = None
    connections, processes = [], []
    try:
        for rank in range(num_workers):
            ours, theirs = context.Pipe()
            place = WorkerPlace(rank, num_workers, "127.0.0.1", port)
            process = context.Process(target=serve, args=(theirs, place, device, cloudpickle.dumps(work)))
            process.start()
            theirs.close()
            if rank == 0:
                port = ours.recv()
            connections.append(ours)
            processes.append(process)
        answers = [cloudpickle.loads(connection.recv()) for connection in connections]
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    errors = [answer for answer in answers if isinstance(answer, RemoteError)]
    if errors:  # that of a rank which lost another one says little
        raise min(errors, key=lambda error: "closed by peer" in error.message).exception()
    return answers


def serve(connection: Connection, place: WorkerPlace, device: torch.device, payload: bytes) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":  # before anything asks for a GPU, as what loads `work` may
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place.rank)
    work = cloudpickle.loads(payload)
    group = RankGroup.join(place, device, connection.send)
    try:
        answer = work(group)
    except Exception as error:  # noqa: BLE001 -- raised again by the test's process
        answer = RemoteError.from_exception(error)
    connection.send(cloudpickle.dumps(answer))
    if not isinstance(answer, RemoteError):
        group.leave()
