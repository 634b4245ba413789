"""The memory estimate beside real peaks on a GPU, for many architectures.

    python benchmarks/estimate_accuracy.py measure --out benchmarks/estimate_accuracy_h100.jsonl
    python benchmarks/estimate_accuracy.py table benchmarks/estimate_accuracy_h100.jsonl

`measure` needs a GPU (and transformers for some of the models): the peak of each phase at several micro-batch
sizes, gradients and optimizer state resident, one JSON line per architecture and precision; what is there
already is not measured again. `table` needs none: it estimates here and compares.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from architectures import architectures
from torch import nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.errors import EstimateError
from tune_easytrain.estimate import estimate_task
from tune_easytrain.memory import CudaMemory
from tune_easytrain.precision import autocast
from tune_easytrain.task import Task
from tune_easytrain.worst_case import worst_case_batch

SIZES = (2, 4, 8, 16, 32)
PRECISIONS = ("fp32", "bf16")
MOST_SECONDS_PER_CASE = 25.0
DEVICE = torch.device("cuda", 0)


def measure(options: argparse.Namespace) -> None:
    """Measure what is not in the file yet, until the time is up."""
    deadline = time.monotonic() + options.seconds
    done = {(line["model"], line["precision"]) for line in load(options.out)}
    memory = CudaMemory(DEVICE)
    for name, build in architectures().items():
        for precision in PRECISIONS:
            if (name, precision) in done or time.monotonic() > deadline:
                continue
            line = {
                "model": name,
                "precision": precision,
                "device": torch.cuda.get_device_name(DEVICE),
                "torch": torch.__version__,
                "peaks": measure_case(build(), precision, memory),
            }
            with Path(options.out).open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(name, precision, {size: max(peaks.values()) >> 20 for size, peaks in line["peaks"].items()})


def measure_case(task: Task, precision: Any, memory: CudaMemory) -> dict[int, dict[str, int]]:
    """Return the peak bytes of each phase by size, as far as memory and time allow."""
    start, peaks = time.monotonic(), dict[int, dict[str, int]]()
    for size in SIZES:
        if time.monotonic() - start > MOST_SECONDS_PER_CASE:
            break
        try:
            peaks[size] = measure_size(task, size, precision, memory)
        except torch.OutOfMemoryError:
            break
        finally:
            memory.release()
    return peaks


def measure_size(task: Task, size: int, precision: Any, memory: CudaMemory) -> dict[str, int]:
    """Return the peak bytes of each phase in the steady state."""
    gc.collect()
    memory.release()
    peaks: dict[str, int] = {}
    model = task.model().to(DEVICE).train()
    optimizer = task.optimizer(model)

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        with autocast(DEVICE, precision):
            return task.loss(net, batch)

    def note(phase: str) -> None:
        peaks[phase] = memory.peak_bytes()
        memory.reset_peak()

    tiny, full = worst_case_batch(task, 2, DEVICE), worst_case_batch(task, size, DEVICE)
    accumulate_gradients(model, loss, [tiny])
    optimizer.step()
    accumulate_gradients(model, loss, [tiny])  # leaves gradients that the full micro-batch adds to
    memory.reset_peak()
    value = loss(model, full)
    note("forward")
    value.backward()  # type: ignore[no-untyped-call]
    del value
    note("backward")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    note("optimizer")
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad(), autocast(DEVICE, precision):
        task.loss(model, full)
    note("evaluation")
    return peaks


def table(options: argparse.Namespace) -> None:
    """Print estimate over real peak by size, and over all of at least 8 samples."""
    builders, ratios = architectures(), []
    print("| model | | " + " | ".join(f"m = {size}" for size in SIZES) + " |")
    print("|" + "---|" * (2 + len(SIZES)))
    for line in load(options.out):
        peaks = {int(size): max(phases.values()) for size, phases in line["peaks"].items()}
        try:
            estimate = estimate_task(builders[line["model"]](), precision=line["precision"], clip_norm=1.0)
        except EstimateError as error:
            print(f"| {line['model']} | {line['precision']} | {error} |")
            continue
        shares = {size: estimate.peak_bytes(size) / peak for size, peak in peaks.items()}
        ratios += [share for size, share in shares.items() if size >= 8]
        cells = [f"{shares[size]:.3f}" if size in shares else "" for size in SIZES]
        print("| " + " | ".join([line["model"], line["precision"], *cells]) + " |")
    median = statistics.median(ratios)
    print(f"\nm >= 8: median {median:.3f}, least {min(ratios):.3f}, most {max(ratios):.3f}, of {len(ratios)}")


def load(path: str) -> list[dict[str, Any]]:
    """Return what has been measured."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", required=True)
    measuring.add_argument("--seconds", type=float, default=3600.0, help="start no case after this long")
    measuring.set_defaults(do=measure)
    printing = commands.add_parser("table")
    printing.add_argument("out")
    printing.set_defaults(do=table)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
