"""What the built-in training loop costs beside a plain one, written by hand.

    python benchmarks/train_loop_overhead.py --json benchmarks/train_loop_overhead_h100.jsonl
    python benchmarks/train_loop_overhead.py --device cpu

Both loops train the same video model with Adam in the same micro-batches, four to a step, without clipping,
on clips that are on the device already, and read the loss once in a step. The plain one is a `DataLoader`,
two nested `for` and nothing else: no seed per sample, no unequal sizes, no second try when memory runs out.
The loops take turns, three times each; a round's ratio is the built-in loop's time per step over the plain
one's. On a CPU the clips are small and the figures mean nothing.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from resident_clips import Case, StepClock, resident_task, run_loop
from table_rows import keep_row, make_parser
from torch.utils.data import DataLoader

from tune_easytrain.devices import device_name
from tune_easytrain.memory import device_memory

NUM_WARMUP_STEPS = 3
ACCUMULATION_STEPS = 4
CASES = {
    Case("r3d_18", "fp32", 64, ACCUMULATION_STEPS): 8,
    Case("r3d_18", "bf16", 64, ACCUMULATION_STEPS): 12,
    Case("swin3d_t", "fp32", 16, ACCUMULATION_STEPS): 4,
    Case("swin3d_t", "bf16", 16, ACCUMULATION_STEPS): 8,
    Case("r3d_18", "bf16", 64, ACCUMULATION_STEPS, loader_workers=2): 12,
    Case("r3d_18", "fp32", 8, ACCUMULATION_STEPS): 30,
}
"""Each with the steps that are timed."""
SMOKE_CASES = {
    Case(model, "fp32", 1, ACCUMULATION_STEPS, loader_workers=loader_workers, is_small=True): 2
    for model, loader_workers in (("r3d_18", 0), ("swin3d_t", 1))
}


def run_plain(case: Case, num_steps: int, device: torch.device) -> StepClock:
    """Train as anybody would, with the same model, data, optimizer and micro-batches."""
    clock = StepClock()
    task = resident_task(case, num_steps * case.effective_batch_size, device, clock)
    torch.manual_seed(0)
    model = task.model().to(device).train()
    optimizer = task.optimizer(model)
    loader = DataLoader(
        task.train_data(),
        batch_size=case.microbatch_size,
        shuffle=True,
        num_workers=case.loader_workers,
        pin_memory=device.type == "cuda",
    )
    batches: Iterator[torch.Tensor] = iter(loader)
    for _ in range(num_steps):
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for _ in range(case.accumulation_steps):
            batch = next(batches).to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
                loss = task.loss(model, batch)
            (loss / case.accumulation_steps).backward()
            total += loss.detach() / case.accumulation_steps
        optimizer.step()
        total.item()
    return clock


def measure(case: Case, num_timed: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return one row: both loops' seconds per step in each round, and the median of the ratios."""
    num_steps = NUM_WARMUP_STEPS + num_timed
    seconds: dict[str, list[float]] = {"built_in": [], "plain": []}
    for number in range(rounds):
        for side in ("built_in", "plain") if number % 2 else ("plain", "built_in"):
            release(device)
            run = run_loop(case, num_steps, device)[0] if side == "built_in" else None
            clock = run_plain(case, num_steps, device) if run is None else run
            seconds[side].append(clock.seconds_per_step(NUM_WARMUP_STEPS))
            del run, clock
    ratios = [ours / plain for ours, plain in zip(seconds["built_in"], seconds["plain"], strict=True)]
    return {
        "model": case.model,
        "precision": case.precision,
        "microbatch_size": case.microbatch_size,
        "accumulation_steps": case.accumulation_steps,
        "loader_workers": case.loader_workers,
        "device": device_name(device),
        "torch": torch.__version__,
        "timed_steps": num_timed,
        "built_in_seconds_per_step": [round(value, 6) for value in seconds["built_in"]],
        "plain_seconds_per_step": [round(value, 6) for value in seconds["plain"]],
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 4),
    }


def release(device: torch.device) -> None:
    """Free what the run before has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    built_in, plain = (statistics.median(row[f"{side}_seconds_per_step"]) for side in ("built_in", "plain"))
    print(
        f"{row['model']:10} {row['precision']:5} {row['microbatch_size']:4} x {row['accumulation_steps']} "
        f"{row['loader_workers']:8} {plain * 1e3:11.2f} {built_in * 1e3:14.2f} {row['median_ratio']:8.4f} "
        f"{min(row['ratios']):8.4f} to {max(row['ratios']):.4f}",
        flush=True,
    )


def main() -> None:
    """Measure, print the table, write JSON lines."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", help="these alone")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    device_memory(device)  # sets the allocator up, for both loops alike
    print(
        f"{'model':10} {'':5} {'m':>4} x k {'loaders':>8} {'plain (ms)':>11} {'built-in (ms)':>14} "
        f"{'ratio':>8} {'rounds':>8}"
    )
    for case, num_timed in (CASES if device.type == "cuda" else SMOKE_CASES).items():
        if arguments.models and case.model not in arguments.models:
            continue
        row = measure(case, num_timed, arguments.rounds, device)
        print_row(row)
        keep_row(row, arguments.json)


if __name__ == "__main__":
    main()
