"""How much sooner a sweep of small trials is done when they share a GPU by their estimates.

    python benchmarks/packing.py --json benchmarks/packing_h100.jsonl
    python benchmarks/packing.py --device cpu

The same eight trials of video models, 20 optimizer steps each on clips of random numbers, run twice: with
a whole GPU for each trial, and with `trial.resources.gpu: auto`, which gives each the share that its
estimate needs. The seconds are those of `te.run` in a Ray that is up. On a CPU one trial at a time is
compared with two, on small clips, which says nothing but that this works.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from table_rows import keep_row, make_parser
from torch import Tensor, nn
from torch.utils.data import Dataset

import tune_easytrain as te
from tune_easytrain.cluster import ray_session

MODELS = ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"]
NUM_CLASSES = 101


class Clips(Dataset[tuple[Tensor, int]]):
    """Clips of random numbers, 3 × frames × size × size each."""

    def __init__(self, num_clips: int, frames: int, size: int) -> None:
        self._num_clips = num_clips
        self._clip = torch.rand(3, frames, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self._num_clips

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._clip, index % NUM_CLASSES


def build_task(config: dict[str, Any]) -> te.Task:
    """Return the task of one trial: `model.type`, `hp.learning_rate`, `data.frames`, `data.size`."""
    shape, name = config["data"], config["model"]["type"]

    def model() -> nn.Module:
        built: Any = getattr(torchvision.models.video, name)(weights=None, num_classes=NUM_CLASSES)
        if name == "s3d":
            built.avgpool = nn.AdaptiveAvgPool3d(1)  # its own wants larger clips
        return built

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return te.Task(
        model=model,
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=config["hp"]["learning_rate"]),
        train_data=lambda: Clips(shape["num_clips"], shape["frames"], shape["size"]),
        worst_case=lambda m: (
            torch.rand(m, 3, shape["frames"], shape["size"], shape["size"]),
            torch.zeros(m, dtype=torch.long),
        ),
    )


def make_sweep(storage: str, is_cpu: bool) -> dict[str, Any]:
    """Return the sweep without `trial` and `max_concurrent`."""
    data = {"num_clips": 320, "frames": 16, "size": 112}
    if is_cpu:
        data = {"num_clips": 4, "frames": 4, "size": 32}
    return {
        "name": "packing",
        "task": f"{Path(__file__).resolve()}:build_task",
        "config": {"data": data},
        "grid_search": {
            "grid": {
                "model.type": MODELS[:2] if is_cpu else MODELS,
                "hp.batch_size": [2] if is_cpu else [16],
                "hp.learning_rate": [1e-4] if is_cpu else [1e-4, 1e-5],
            }
        },
        "batch": {
            "effective_batch_size": 2 if is_cpu else 16,
            **({"memory_budget": "1GiB"} if is_cpu else {}),
        },
        "train": {"num_steps": 2 if is_cpu else 20},
        "run": {"metric": "train_loss", "mode": "min", "storage": storage},
    }


def measure(sweep: dict[str, Any]) -> dict[str, Any]:
    """Run the sweep, and return what it took and what became of its trials."""
    start = time.perf_counter()
    frame = te.run(sweep, quiet=True).frame()
    seconds = time.perf_counter() - start
    return {
        "gpu": sweep["trial"]["resources"]["gpu"],
        "num_trials": len(frame),
        "seconds": round(seconds, 1),
        "states": frame["state"].value_counts().to_dict(),
        "errors": sorted(set(frame["error"]) - {""}),
        "num_rescues": int(frame["num_rescues"].fillna(0).sum()),
        "microbatch_sizes": sorted({int(size) for size in frame["microbatch_size"].dropna()}),
        "samples_per_second": [round(value, 1) for value in frame["samples_per_second"].dropna()],
    }


def gpu_used_mib() -> int | None:
    """Return what nvidia-smi says is in use on the first GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    """Measure, print the table, write JSON lines."""
    arguments = make_parser(__doc__).parse_args()
    is_cpu = arguments.device == "cpu"
    name = "cpu" if is_cpu else torch.cuda.get_device_name()
    machine = {"device": name, "torch": torch.__version__, "num_cores": len(os.sched_getaffinity(0))}
    print(f"{'GPUs':>6} {'trials':>7} {'seconds':>8}  of the GPU in use before and after (MiB)")
    seconds = []
    with tempfile.TemporaryDirectory() as storage, ray_session("local"):
        for gpu, max_concurrent in ((0, 1), (0, 2)) if is_cpu else ((1, None), ("auto", None)):
            sweep = make_sweep(storage, is_cpu) | {"trial": {"resources": {"cpu": 1, "gpu": gpu}}}
            sweep["run"]["max_concurrent"] = max_concurrent
            before = gpu_used_mib()
            row = {**measure(sweep), "used_mib_before": before, "used_mib_after": gpu_used_mib(), **machine}
            seconds.append(row["seconds"])
            print(
                f"{row['gpu']!s:>6} {row['num_trials']:7} {row['seconds']:8.1f}  {before} → "
                f"{row['used_mib_after']}; {row['states']}, {row['num_rescues']} rescues",
                *row["errors"],
                flush=True,
            )
            keep_row(row, arguments.json)
    print(f"{seconds[0] / seconds[1]:.2f} times as fast")


if __name__ == "__main__":
    main()
