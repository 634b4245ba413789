"""Run by torchrun with the programs of docs/accumulation.md on the path: train with each loop that is named.

Each process saves the weights that a loop led to as `NAME_RANK.pt`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from curve import build_model, loss, make_data  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from whole_window import average_gradients  # type: ignore[import-not-found]

import tune_easytrain as te


def read_shares() -> Iterator[tuple[Tensor, ...]]:
    """Yield this process's share of every window."""
    plan = te.BatchPlan.build(21, 21, num_workers=dist.get_world_size(), rank=dist.get_rank())
    data = make_data()
    for epoch in range(3):
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(epoch))
        for window in order.split(21):
            window_plan = plan.for_window(len(window))
            share = window[window_plan.window_offset() :][: window_plan.num_samples]
            yield tuple(tensor[share] for tensor in data)


def add_up(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def by_hand() -> nn.Module:
    """DDP by the page's recipe, with micro-batches of other sizes and in another number on each process."""
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for share in read_shares():
        record = None
        if num_samples := len(share[0]):
            first = min(num_samples, 2 + dist.get_rank())
            sizes = [first, num_samples - first] if dist.get_rank() else [first, *[1] * (num_samples - first)]
            with model.no_sync():
                record = te.accumulate_gradients(model, loss, te.split_batch(share, sizes))
        average_gradients(model, record, add_up)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model.module


def averaged_by_ddp() -> nn.Module:
    """One full window of unequal shares, with the mean over the processes left to DDP."""
    model = DistributedDataParallel(build_model())
    te.accumulate_gradients(model, loss, [next(read_shares())])
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model.module


def with_fabric() -> nn.Module:
    import fabric_loop  # type: ignore[import-not-found]

    fabric = fabric_loop.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    assert fabric.world_size == 2
    module: nn.Module = fabric_loop.train(fabric).module
    return module


def with_accelerate() -> nn.Module:
    import accelerate_loop  # type: ignore[import-not-found]

    accelerator = accelerate_loop.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    module: nn.Module = accelerator.unwrap_model(accelerate_loop.train(accelerator))
    return module


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "by_hand": by_hand,
    "averaged_by_ddp": averaged_by_ddp,
    "fabric": with_fabric,
    "accelerate": with_accelerate,
}

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        torch.save(LOOPS[name]().state_dict(), f"{name}_{dist.get_rank()}.pt")
    dist.destroy_process_group()
