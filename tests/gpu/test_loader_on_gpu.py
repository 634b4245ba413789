"""Micro-batches that reach a GPU, and what counts as waiting for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tune_easytrain import BatchPlan, Task
from tune_easytrain.data_wait import DataWait
from tune_easytrain.loader import EpochLoader, epoch_order

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 2**20


class Megabytes(Dataset[Tensor]):
    """Sample i is a MiB that holds the number i."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((MIB // 4,), index, dtype=torch.int32)


def make_loader(num_workers: int) -> EpochLoader:
    data = Megabytes()
    task = Task(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: batch.sum(),
        optimizer=lambda model: torch.optim.SGD(model.parameters()),
        train_data=lambda: data,
    )
    return EpochLoader(task, data, torch.device("cuda"), seed=0, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_microbatch_arrives_and_the_device_holds_one_at_a_time(num_workers):
    loader, plan = make_loader(num_workers), BatchPlan.build(6, 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for epoch in range(2):
        windows = loader.windows(6, epoch)
        ids = []
        for index in range(len(windows)):
            for batch in windows.read(index, plan):
                torch.cuda._sleep(10**7)  # the copy must not outrun the step, nor the host's buffer the copy
                assert batch.is_cuda
                assert torch.cuda.memory_allocated() - before <= 3 * MIB
                ids.append(batch.double().mean(dim=1))
                before += 512  # the means
                del batch
        assert torch.cat(ids).tolist() == epoch_order(12, 0, epoch)
        assert windows.wait_seconds > 0
        del ids
        before = torch.cuda.memory_allocated()


def test_reading_while_the_device_is_busy_is_not_waiting():
    wait = DataWait(torch.device("cuda"))
    data = Megabytes()
    with wait:
        data[0]
    assert wait.seconds > 0
    idle = wait.seconds
    torch.cuda._sleep(10**10)  # seconds
    with wait:
        data[0]
    assert wait.seconds - idle < idle
