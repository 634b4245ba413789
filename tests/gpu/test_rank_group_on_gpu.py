"""Workers of one trial on GPUs: each process sees a GPU of its own, and calls it `cuda`."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor, nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.protocol import WorkerPlace
from tune_easytrain.rank_group import RankGroup

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHARES = {1: [(4, 3)], 2: [(4,), (3,)]}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def make_samples() -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def serve(connection: Connection, rank: int, num_workers: int, port: int | None) -> None:
    device = torch.device("cuda")
    address = None if port is None else ("127.0.0.1", port)
    group = RankGroup.join(WorkerPlace(rank, num_workers, address), device, connection.send)
    model = make_net().to(device)
    shares = SHARES[num_workers]
    start = sum(sum(share) for share in shares[:rank])
    samples = make_samples()[start : start + sum(shares[rank])].to(device)
    record = accumulate_gradients(model, loss, samples.split(list(shares[rank])))
    group.average_gradients(model.parameters(), record)
    connection.send(([p.grad.cpu().numpy() for p in model.parameters()], group.sum([1.0, rank])))
    group.leave()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_worker_gets_the_gradient_of_the_whole_window(num_workers, monkeypatch):
    if torch.cuda.device_count() < num_workers:
        pytest.skip(f"needs {num_workers} GPUs")
    context = multiprocessing.get_context("spawn")
    port, connections, processes = None, [], []
    for rank in range(num_workers):
        ours, theirs = context.Pipe()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(rank))  # before this module is imported there
        process = context.Process(target=serve, args=(theirs, rank, num_workers, port), daemon=True)
        process.start()
        theirs.close()
        if rank == 0:
            port = ours.recv()
        connections.append(ours)
        processes.append(process)
    answers = [connection.recv() for connection in connections]
    for process in processes:
        process.join(30)
    model = make_net()
    loss(model, make_samples()).backward()
    for gradients, total in answers:
        assert total == [num_workers, sum(range(num_workers))]
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(gradient), parameter.grad, rtol=1e-10, atol=1e-12)
