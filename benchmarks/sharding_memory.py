"""Estimated and measured peak memory of one rank, unsharded and sharded, on all GPUs of this machine.

Each case trains a transformer of 12 layers (400 million parameters, Adam, short sequences) and r3d_18 for a
few windows in one process per rank, with NCCL on GPUs and gloo on a CPU. No Ray and no pydantic are needed.

    python benchmarks/sharding_memory.py --out sharding_memory.json
    python benchmarks/sharding_memory.py --device cpu     # only that it runs, at a small size
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.estimate import estimate_task
from tune_easytrain.optimizer_shards import shard_optimizer
from tune_easytrain.rank_group import RankGroup
from tune_easytrain.rescue import StateSnapshot
from tune_easytrain.sharded_model import EqualPasses, is_sharded, place_model
from tune_easytrain.task import Task
from tune_easytrain.worst_case import worst_case_batch

SHARDINGS = ("none", "optimizer", "full")
NUM_WINDOWS, ACCUMULATION_STEPS = 3, 2
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """What one rank of one case took, in bytes."""

    model: str
    sharding: str
    rank: int
    num_workers: int
    microbatch_size: int
    num_parameters: int
    estimated_bytes: int
    measured_bytes: int


class Layer(nn.Module):
    """One layer of a transformer, causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.join, self.second_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (samples, tokens, width) to the same shape."""
        samples, tokens, width = x.shape
        parts = self.mix(self.norm(x)).view(samples, tokens, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.join(attended.transpose(1, 2).reshape(x.shape))
        out: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.second_norm(x))))
        return out


class Transformer(nn.Module):
    """A language model."""

    def __init__(self, width: int, num_layers: int, num_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(num_layers)))
        self.head = nn.Linear(width, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (samples, tokens) to logits."""
        out: Tensor = self.head(self.layers(self.embedding(tokens)))
        return out


def transformer_task(is_small: bool) -> Task:
    """About 400 million parameters, 64 tokens a sample."""
    width, num_layers, num_tokens = (128, 4, 512) if is_small else (1536, 12, 16384)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Task(
        model=lambda: Transformer(width, num_layers, num_tokens),
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
        train_data=lambda: [torch.zeros(65, dtype=torch.long)],  # type: ignore[arg-type,return-value]
        worst_case=lambda m: torch.zeros(m, 65, dtype=torch.long),
    )


def video_task(is_small: bool) -> Task:
    """r3d_18 on clips of 16 frames."""
    from torchvision.models.video import r3d_18

    size = 32 if is_small else 112

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def worst_case(m: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(m, 3, 16, size, size), torch.zeros(m, dtype=torch.long)

    return Task(
        model=lambda: r3d_18(num_classes=101),
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
        train_data=lambda: [worst_case(1)],  # type: ignore[arg-type,return-value]
        worst_case=worst_case,
    )


TASKS = {"transformer": (transformer_task, 4), "r3d_18": (video_task, 4)}


def measure(
    task: Task, microbatch_size: int, sharding: Any, ranks: RankGroup, device: torch.device
) -> tuple[int, int]:
    """Train a few windows; return the number of parameters and the peak bytes of this rank's tensors."""
    gc.collect()
    model = place_model(task.model(), device, ranks, sharding).train()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = task.optimizer(model)
    shards = shard_optimizer(optimizer, sharding, ranks.rank, ranks.num_workers)
    snapshot = StateSnapshot(model)
    passes = EqualPasses(model, ranks, lambda: worst_case_batch(task, 1, device))
    for window in range(NUM_WINDOWS):
        if window == 1 and device.type == "cuda":  # the steady state begins here
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        snapshot.take()
        batches = (worst_case_batch(task, microbatch_size, device) for _ in range(ACCUMULATION_STEPS))
        if is_sharded(model):
            passes.accumulate(task.loss, batches, ACCUMULATION_STEPS, weight=None, backward=Tensor.backward)
        else:
            record = accumulate_gradients(model, task.loss, batches)
            ranks.average_gradients(model.parameters(), record)
        optimizer.step()
        shards.share_parameters(ranks.broadcast)
    if device.type != "cuda":
        return num_parameters, 0
    torch.cuda.synchronize(device)
    return num_parameters, torch.cuda.max_memory_allocated(device)


def run_rank(rank: int, num_workers: int, port: int, options: argparse.Namespace, folder: str) -> None:
    """Run every case as one rank, and write down what it took."""
    is_cpu = options.device == "cpu"
    device = torch.device("cpu") if is_cpu else torch.device("cuda", rank)
    if is_cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo" if is_cpu else "nccl", rank=rank, world_size=num_workers)
    ranks = RankGroup(rank, num_workers, device)
    cases = []
    for name in options.models:
        build, microbatch_size = TASKS[name]
        task = build(is_cpu)
        for sharding in SHARDINGS:
            num_parameters, measured = measure(task, microbatch_size, sharding, ranks, device)
            gc.collect()
            if not is_cpu:
                torch.cuda.empty_cache()
            case = Case(name, sharding, rank, num_workers, microbatch_size, num_parameters, 0, measured)
            cases.append(asdict(case))
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(cases))
    dist.destroy_process_group()


def main() -> None:
    """Run the cases, estimate them, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workers", type=int, default=None, help="ranks; default: all GPUs, 2 on a CPU")
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the numbers")
    options = parser.parse_args()
    num_workers = options.workers or (2 if options.device == "cpu" else torch.cuda.device_count())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (num_workers, port, options, folder), num_workers)
        cases = [
            case
            for rank in range(num_workers)
            for case in json.loads(Path(folder, f"rank_{rank}.json").read_text())
        ]
    estimates = {}
    for name in options.models:
        build, microbatch_size = TASKS[name]
        for sharding in SHARDINGS:
            estimate = estimate_task(
                build(options.device == "cpu"), sharding=sharding, num_workers=num_workers
            )  # type: ignore[arg-type]
            estimates[name, sharding] = estimate.peak_bytes(microbatch_size)
    print(
        f"{'model':12} {'sharding':10} {'rank':>4} {'parameters':>11} "
        f"{'estimated':>10} {'measured':>10} {'ratio':>6}"
    )
    for case in cases:
        case["estimated_bytes"] = estimates[case["model"], case["sharding"]]
        measured, estimated = case["measured_bytes"], case["estimated_bytes"]
        ratio = f"{estimated / measured:.3f}" if measured else "-"
        print(
            f"{case['model']:12} {case['sharding']:10} {case['rank']:4} "
            f"{case['num_parameters'] / 1e6:9.1f} M "
            f"{estimated / GIB:6.2f} GiB {measured / GIB:6.2f} GiB {ratio:>6}"
        )
    if options.out is not None:
        device_name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
        numbers = {"device": device_name, "torch": torch.__version__, "cases": cases}
        options.out.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
