"""What memory strategies gain and cost on a GPU, and how well their memory is predicted.

    python benchmarks/strategies.py --json benchmarks/strategies_h100.jsonl
    python benchmarks/strategies.py --device cpu

The nine video models at their published input, Adam, 101 classes:

- `speed`: fp32, bf16, and bf16 with channels last: the largest micro-batch, found as a trial finds it, and
  the samples per second of the forward and backward passes that training would use for E = 512.
- `checkpointing`: no blocks, half of them, all of them, at one micro-batch for all three.
- `compile`: two of them in bf16 with channels last, as they are and compiled, at one micro-batch for both.

Every row tells the estimated and the measured peak. On a CPU one small case shows that it runs.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from table_rows import keep_row, make_parser
from torch import Tensor, nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.child_process import forkserver_context
from tune_easytrain.compiled_model import CompiledModel
from tune_easytrain.devices import device_name
from tune_easytrain.estimate import estimate_task
from tune_easytrain.memory import device_memory
from tune_easytrain.memory_budget import BudgetRequest, probed_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.precision import autocast
from tune_easytrain.probe import SearchPlan, find_largest
from tune_easytrain.probe_attempt import run_attempt
from tune_easytrain.strategies import with_strategies
from tune_easytrain.task import Task
from tune_easytrain.worst_case import worst_case_batch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import ucf101

EFFECTIVE_BATCH_SIZE = 512
LIMIT = 1024
PARTS = ("speed", "checkpointing", "compile")
COMPILED = {"r3d_18": 64, "swin3d_t": 16}
"""The models that are compiled, with their micro-batches."""
MODELS = (
    "r3d_18",
    "mc3_18",
    "r2plus1d_18",
    "s3d",
    "mvit_v1_b",
    "mvit_v2_s",
    "swin3d_t",
    "swin3d_s",
    "swin3d_b",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a model with its strategies; `microbatch_size` 0 is the largest that fits."""

    part: str
    model: str
    precision: Any = "fp32"
    channels_last: bool = False
    checkpointing: str | float = "none"
    compile: bool = False
    microbatch_size: int = 0
    clip: tuple[int, int] | None = None

    def task(self) -> Task:
        """Return the task as a trial with these strategies trains it; it has no data set to open."""
        task = ucf101.build_task(
            {"model": {"type": self.model}, "optimizer": {"name": "adam"}, "hp": {"learning_rate": 1e-3}}
        )
        task.train_data = lambda: range(10**6)
        if self.clip is not None:
            frames, size = self.clip
            task.worst_case = lambda num_samples: (
                torch.zeros(num_samples, 3, frames, size, size),
                torch.zeros(num_samples, dtype=torch.long),
            )
        return with_strategies(task, checkpointing=self.checkpointing, channels_last=self.channels_last)


def cases(device: torch.device, models: Sequence[str]) -> Iterator[Case]:
    """Yield the rows, all of one model together."""
    if device.type == "cpu":
        yield Case("speed", "r3d_18", clip=(4, 16), microbatch_size=2)
        yield Case("speed", "r3d_18", "bf16", channels_last=True, clip=(4, 16), microbatch_size=2)
        yield Case("checkpointing", "r3d_18", checkpointing="blocks", clip=(4, 16), microbatch_size=2)
        yield Case("compile", "r3d_18", compile=True, clip=(4, 16), microbatch_size=2)
        return
    for model in models:
        yield Case("speed", model)
        yield Case("speed", model, "bf16")
        yield Case("speed", model, "bf16", channels_last=True)
        for checkpointing in ("none", 0.5, "blocks"):
            yield Case("checkpointing", model, checkpointing=checkpointing, microbatch_size=8)
        for is_compiled in (False, True) if model in COMPILED else ():
            yield Case(
                "compile",
                model,
                "bf16",
                channels_last=True,
                compile=is_compiled,
                microbatch_size=COMPILED[model],
            )


def estimate(case: Case, device_type: Any) -> MemoryEstimate:
    """Return the case's estimate; no device is touched."""
    torch.set_num_threads(1)
    return estimate_task(case.task(), precision=case.precision, device=device_type)


def measure(rows: Sequence[tuple[Case, MemoryEstimate]], device_type: str) -> list[dict[str, Any]]:
    """Return the rows of one model, each measured after the one before has left the device."""
    device = torch.device(device_type)
    memory = device_memory(device)
    budget_bytes = memory.budget_bytes(
        BudgetRequest(memory_fraction=0.9, device_share=1.0, memory_budget_bytes=None)
    )
    return [_row(case, estimated, device, memory, budget_bytes) for case, estimated in rows]


def _row(
    case: Case, estimated: MemoryEstimate, device: torch.device, memory: Any, budget_bytes: int
) -> dict[str, Any]:
    task = case.task()
    memory.cap(probed_bytes(budget_bytes))

    def attempt(size: int) -> Any:
        return run_attempt(
            task,
            size,
            device=device,
            memory=memory,
            precision=case.precision,
            is_compiled=case.compile,
        )

    limit = case.microbatch_size or LIMIT
    found = find_largest(attempt, SearchPlan(limit=limit, budget_bytes=budget_bytes, estimate=estimated))
    size = found.microbatch_size
    peak = next(a.peak_bytes for a in found.attempts if a.microbatch_size == size)
    memory.cap(budget_bytes)
    used = size
    if not case.microbatch_size:
        used = BatchPlan.build(EFFECTIVE_BATCH_SIZE, min(size, EFFECTIVE_BATCH_SIZE)).microbatch_size
    rate = samples_per_second(task, case, used, device)
    memory.release()
    return {
        **asdict(case),
        "largest": size,
        "tries": len(found.attempts),
        "used": used,
        "samples_per_second": round(rate, 2),
        "estimated_peak_bytes": estimated.peak_bytes(size),
        "peak_bytes": peak,
        "flops_per_sample": estimated.flops_per_sample,
        "device": device_name(device),
        "torch": torch.__version__,
    }


def samples_per_second(task: Task, case: Case, size: int, device: torch.device) -> float:
    """Return the rate of forward and backward passes, after two to warm up."""
    model = task.model().to(device).train()
    if case.compile:
        CompiledModel(model)
    batch = worst_case_batch(task, size, device)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        with autocast(device, case.precision):
            return task.loss(net, batch)

    for _ in range(2):
        accumulate_gradients(model, loss, [batch])
    synchronize(device)
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < 1.0:
        accumulate_gradients(model, loss, [batch])
        synchronize(device)
        count += 1
    rate = count * size / (time.perf_counter() - start)
    del model, batch
    gc.collect()
    return rate


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    strategy = f"{row['precision']}{' channels last' if row['channels_last'] else ''}"
    if row["part"] == "checkpointing":
        strategy += f" checkpointing {row['checkpointing']}"
    if row["compile"]:
        strategy += " compiled"
    ratio = row["estimated_peak_bytes"] / row["peak_bytes"] if row["peak_bytes"] else float("nan")
    print(
        f"{row['model']:12} {strategy:28} {row['largest']:5} {row['tries']:5} {row['used']:5} "
        f"{row['samples_per_second']:10.1f} {row['peak_bytes'] / 2**30:10.2f} {ratio:8.3f}",
        flush=True,
    )


def main() -> None:
    """Measure, print the table, write JSON lines."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="these alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="these alone")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    todo = [case for case in cases(device, arguments.models) if case.part in arguments.parts]
    context = forkserver_context(("torchvision",))
    with ProcessPoolExecutor(8, context) as pool:
        estimates = list(pool.map(estimate, todo, [device.type] * len(todo)))
    headings = ("fits", "tries", "m", "samples/s", "peak (GiB)", "estimate")
    widths = (5, 5, 5, 10, 10, 8)
    columns = (f"{heading:>{width}}" for heading, width in zip(headings, widths, strict=True))
    print(f"{'model':12} {'strategy':28}", *columns)
    for model in dict.fromkeys(case.model for case in todo):
        rows = [pair for pair in zip(todo, estimates, strict=True) if pair[0].model == model]
        with ProcessPoolExecutor(1, context) as pool:  # a process, and with it a CUDA context, per model
            for row in pool.submit(measure, rows, arguments.device).result():
                print_row(row)
                keep_row(row, arguments.json)


if __name__ == "__main__":
    main()
