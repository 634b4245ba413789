"""How much faster one trial trains on two GPUs than on one, and whether it trains the same.

    python benchmarks/workers_speedup.py --json benchmarks/workers_speedup_h200.jsonl
    python benchmarks/workers_speedup.py --device cpu

One worker, one worker again and two workers take a few steps of SGD in fp32 without TF32, and their
parameters are compared: the norm of the difference over that of how far they have moved. What one worker
gives twice says how much of it is chance.

Then the built-in loop trains video models with one worker and with two, a process per GPU that meet as a
trial's workers do, at the same effective batch size and the same largest micro-batch: two workers take half
of the micro-batches each. Clips are on the device already. The ratio is that of samples per second after the
first steps; one worker and two take turns. On a CPU the clips are small and the figures mean nothing.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from resident_clips import Case, StepClock, run_loop, video_task
from table_rows import keep_row, make_parser
from torch import Tensor, multiprocessing

from tune_easytrain.devices import device_name
from tune_easytrain.protocol import WorkerPlace
from tune_easytrain.random_state import seed_everything
from tune_easytrain.rank_group import RankGroup

PARTS = ("weights", "speed")
NUM_WORKERS = 2
NUM_WARMUP_STEPS = 3
NUM_COMPARED_STEPS = (1, 4)
CASES = {
    Case("r3d_18", "fp32", 64, 4): 10,
    Case("r3d_18", "bf16", 64, 4): 14,
    Case("swin3d_t", "bf16", 16, 4): 6,
}
"""Each with the steps that are timed."""
COMPARED_CASE = Case("r3d_18", "fp32", 32, 4, optimizer="sgd", learning_rate=0.01)
SMOKE_CASES = {Case("r3d_18", "fp32", 1, 4, is_small=True): 2}
SMOKE_COMPARED_CASE = Case("r3d_18", "fp32", 2, 4, optimizer="sgd", learning_rate=0.01, is_small=True)


@dataclass(frozen=True, slots=True)
class Job:
    """One training, for one process; without a `place` it trains alone."""

    case: Case
    num_steps: int
    place: WorkerPlace | None
    is_compared: bool


@dataclass(frozen=True, slots=True)
class Done:
    """What came of it: when its steps were, and rank 0's weights at the end."""

    clock: StepClock
    weights: Mapping[str, Tensor]


def serve(number: int, device_type: str, connection: Connection) -> None:
    """Train what is asked for, on a GPU that this process alone sees, as in a trial."""
    if device_type == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    else:
        torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        connection.send(_train(job, torch.device(device_type), connection))


def _train(job: Job, device: torch.device, connection: Connection) -> Done:
    torch.backends.cudnn.allow_tf32 = not job.is_compared  # otherwise as torch has it
    ranks = None if job.place is None else RankGroup.join(job.place, device, connection.send)
    try:
        clock, weights = run_loop(job.case, job.num_steps, device, ranks, keeps_weights=job.is_compared)
    finally:
        if ranks is not None:
            ranks.leave()
    # Numpy's arrays go through a pipe whole; tensors would share memory by a file each.
    return Done(clock, {name: value.numpy() for name, value in weights.items()})


class Workers:
    """The processes, one per GPU, that train one case after another."""

    def __init__(self, device_type: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for number in range(NUM_WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(number, device_type, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def train(self, case: Case, num_steps: int, num_workers: int, *, is_compared: bool = False) -> Done:
        """Return what came of a training with so many workers, as the first of them saw it."""
        first, *others = self._connections[:num_workers]
        place = WorkerPlace(0, num_workers, "127.0.0.1") if others else None
        first.send(Job(case, num_steps, place, is_compared))
        if others:
            port = first.recv()
            for rank, connection in enumerate(others, start=1):
                place = WorkerPlace(rank, num_workers, "127.0.0.1", port)
                connection.send(Job(case, num_steps, place, is_compared))
        done: Done = first.recv()
        for connection in others:
            connection.recv()
        return done

    def end(self) -> None:
        """Let the processes go."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.send(None)
            process.join(30)


def measure(workers: Workers, case: Case, num_timed: int, rounds: int) -> dict[str, Any]:
    """Return one row: samples per second of one worker and of two in each round, and the median ratio."""
    rates: dict[int, list[float]] = {1: [], NUM_WORKERS: []}
    for number in range(rounds):
        for num_workers in (1, NUM_WORKERS) if number % 2 == 0 else (NUM_WORKERS, 1):
            done = workers.train(case, NUM_WARMUP_STEPS + num_timed, num_workers)
            seconds = done.clock.seconds_per_step(NUM_WARMUP_STEPS)
            rates[num_workers].append(case.effective_batch_size / seconds)
    ratios = [two / one for one, two in zip(rates[1], rates[NUM_WORKERS], strict=True)]
    return {
        "what": "speed",
        "model": case.model,
        "precision": case.precision,
        "effective_batch_size": case.effective_batch_size,
        "microbatch_size": case.microbatch_size,
        "timed_steps": num_timed,
        "one_samples_per_second": [round(rate, 2) for rate in rates[1]],
        "two_samples_per_second": [round(rate, 2) for rate in rates[NUM_WORKERS]],
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 4),
    }


def compare(workers: Workers, case: Case, num_steps: int) -> dict[str, Any]:
    """Return how far the parameters of two workers are from those of one, and one's from its own again."""
    seed_everything(0)
    before = {name: value.detach() for name, value in video_task(case).model().named_parameters()}
    trained = [
        workers.train(case, num_steps, num_workers, is_compared=True).weights
        for num_workers in (1, 1, NUM_WORKERS)
    ]
    one, again, two = ({name: torch.from_numpy(run[name]) for name in before} for run in trained)
    return {
        "what": "weights",
        "model": case.model,
        "precision": case.precision,
        "effective_batch_size": case.effective_batch_size,
        "microbatch_size": case.microbatch_size,
        "steps": num_steps,
        "moved": _distance(one, before),
        "two_to_one_share": _distance(two, one) / _distance(one, before),
        "one_again_share": _distance(again, one) / _distance(one, before),
        "two_to_one_most": max(float((two[name] - one[name]).abs().max()) for name in one),
    }


def _distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    squares = [float((left[name].double() - right[name].double()).square().sum()) for name in left]
    return sum(squares) ** 0.5


def print_row(row: dict[str, Any]) -> None:
    """Print one line."""
    if row["what"] == "weights":
        print(
            f"{row['model']} after {row['steps']} step(s): two workers differ from one by "
            f"{row['two_to_one_share']:.1e} of what the weights moved, one from itself by "
            f"{row['one_again_share']:.1e}; no weight by more than {row['two_to_one_most']:.1e}",
            flush=True,
        )
        return
    one, two = (statistics.median(row[f"{name}_samples_per_second"]) for name in ("one", "two"))
    print(
        f"{row['model']:10} {row['precision']:5} {row['effective_batch_size']:5} {row['microbatch_size']:4} "
        f"{one:12.1f} {two:12.1f} {row['median_ratio']:7.3f}  {min(row['ratios']):.3f} to "
        f"{max(row['ratios']):.3f}",
        flush=True,
    )


def main() -> None:
    """Measure, print the table, write JSON lines."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="these alone")
    arguments = parser.parse_args()
    is_cpu = arguments.device == "cpu"
    machine = {"device": device_name(torch.device(arguments.device)), "torch": torch.__version__}
    workers = Workers(arguments.device)

    def keep(row: dict[str, Any]) -> None:
        print_row(row)
        keep_row({**row, **machine}, arguments.json)

    for num_steps in NUM_COMPARED_STEPS if "weights" in arguments.parts else ():
        keep(compare(workers, SMOKE_COMPARED_CASE if is_cpu else COMPARED_CASE, num_steps))
    if "speed" in arguments.parts:
        print(
            f"{'model':10} {'':5} {'E':>5} {'m':>4} {'one (1/s)':>12} {'two (1/s)':>12} {'ratio':>7}  rounds"
        )
        for case, num_timed in (SMOKE_CASES if is_cpu else CASES).items():
            keep(measure(workers, case, num_timed, arguments.rounds))
    workers.end()


if __name__ == "__main__":
    main()
