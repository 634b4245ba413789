"""Finding the largest micro-batch on a GPU: this package beside Lightning's Tuner and accelerate's decorator.

    python benchmarks/find_microbatch.py run --out benchmarks/find_microbatch_h100.jsonl
    python benchmarks/find_microbatch.py table benchmarks/find_microbatch_h100.jsonl

Nine video models at their published input, fp32 and bf16, Adam, 101 classes. Every method works under the
same memory budget, each in a process with a CUDA context of its own, and imports are not counted. One JSON
line per model, precision and method; what is there already is not measured again, so a run may be cut off.

- `ours`: estimate, then confirmation. GPU seconds are from the start of the first child on the device to the
  end of the last; the estimate before it touches no device and counts in wall seconds.
- `truth`: the largest micro-batch that runs at all, by bisection around what `ours` found.
- `throughput`: samples per second by micro-batch size, and of the plan that training would use for E = 512.
- `lightning_binsearch`, `lightning_power`: `Tuner.scale_batch_size` with its defaults.
- `accelerate`: `find_executable_batch_size` from 1024 down.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import ucf101

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.child_process import forkserver_context, modules_to_preload
from tune_easytrain.device_probe import probe_settings
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.plan_timing import SMALLEST_GAIN, candidate_plans
from tune_easytrain.precision import autocast
from tune_easytrain.probe import SearchPlan, find_largest
from tune_easytrain.protocol import Opening
from tune_easytrain.task_source import pickle_function
from tune_easytrain.trial_children import TrialChildren
from tune_easytrain.worst_case import worst_case_batch

EFFECTIVE_BATCH_SIZE = 512
LIMIT = 1024
METHODS = ("ours", "truth", "throughput", "lightning_binsearch", "lightning_power", "accelerate")
PRECISIONS = ("fp32", "bf16")
DEVICE = torch.device("cuda", 0)


def build_task(config: dict[str, Any]) -> Any:
    """The video model, with a training set that has a length and no data."""
    task = ucf101.build_task(config)
    task.train_data = lambda: range(10**6)
    return task


def config_of(model: str) -> dict[str, Any]:
    """Return the trial's config for a model."""
    return {"model": {"type": model}, "optimizer": {"name": "adam"}, "hp": {"learning_rate": 1e-3}}


def run_ours(model: str, precision: str, budget_bytes: int) -> dict[str, Any]:
    """Estimate, then confirm, as `find_microbatch` does, with a clock at the device's door."""
    opening = Opening(
        task_payload=pickle_function(build_task, "build_task"),
        function_payload=None,
        config=config_of(model),
        settings=probe_settings(LIMIT, None, "confirm", budget_bytes, precision),
        device="cuda",
        device_share=1.0,
        num_threads=4,
        scratch_dir="/tmp",
        is_shared=False,
    )
    children = TrialChildren(opening, modules_to_preload())
    start = time.perf_counter()
    estimate = children.estimate()
    if not isinstance(estimate, MemoryEstimate):
        raise estimate
    estimated = time.perf_counter()
    try:
        opened = children.open()
        plan = SearchPlan(limit=LIMIT, budget_bytes=opened.budget_bytes, estimate=estimate)
        result = find_largest(lambda size: children.attempt(size, 600.0), plan)
    finally:
        children.kill()
    end = time.perf_counter()
    best = result.microbatch_size
    peak = next(a.peak_bytes for a in result.attempts if a.microbatch_size == best)
    return {
        "microbatch_size": best,
        "bounded_by": result.bounded_by.value,
        "tries": len(result.attempts),
        "out_of_memory": sum(not a.ran for a in result.attempts),
        "attempts": [[a.microbatch_size, a.outcome.value, a.peak_bytes, a.seconds] for a in result.attempts],
        "gpu_seconds": end - estimated,
        "estimate_seconds": estimated - start,
        "wall_seconds": end - start,
        "estimated_peak_bytes": estimate.peak_bytes(best),
        "tensor_bytes": estimate.tensor_bytes(best),
        "peak_bytes": peak,
        "estimates": {size: estimate.peak_bytes(size) for size in (8, 16, 32)},
    }


def cap(budget_bytes: int) -> None:
    """Make a small GPU out of this one, for every method alike."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), DEVICE)


class Trainer:
    """A model in the steady state of training, for as many micro-batches as are asked for."""

    def __init__(self, model: str, precision: str) -> None:
        self._task = build_task(config_of(model))
        self._precision: Any = precision
        self._model = self._task.model().to(DEVICE).train()
        self._optimizer = self._task.optimizer(self._model)

    def batch(self, size: int) -> Any:
        """Return a batch on the device."""
        return worst_case_batch(self._task, size, DEVICE)

    def window(self, *batches: Any) -> None:
        """Train one window."""

        def loss(net: Any, batch: Any) -> torch.Tensor:
            with autocast(DEVICE, self._precision):
                result: torch.Tensor = self._task.loss(net, batch)
                return result

        accumulate_gradients(self._model, loss, batches)

    def step(self) -> None:
        """Let the optimizer step."""
        self._optimizer.step()


def fits(model: str, precision: str, size: int) -> tuple[bool, int, int]:
    """Whether two windows of this size run; the peak in bytes; the allocator's retries."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    try:
        trainer = Trainer(model, precision)
        tiny = trainer.batch(2)
        trainer.window(tiny)
        trainer.step()
        full = trainer.batch(size)
        for window in ((tiny, full), (full,)):
            trainer.window(*window)
            trainer.step()
        ran = True
    except torch.OutOfMemoryError:
        ran = False
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries
    return ran, torch.cuda.max_memory_allocated(), retries


def run_truth(model: str, precision: str, budget_bytes: int, near: int) -> dict[str, Any]:
    """Bisect for the largest size that runs, to within half a percent or one sample."""
    cap(budget_bytes)
    tried: dict[int, tuple[bool, int, int]] = {}

    def runs(size: int) -> bool:
        tried[size] = fits(model, precision, size)
        return tried[size][0]

    low, high, step = 0, LIMIT + 1, max(1, round(near * 0.03))
    size = near
    while low == 0 or (high > LIMIT and low < LIMIT):
        if runs(size):
            low, size = size, min(LIMIT, size + step)
        else:
            high, size = size, max(1, size - step)
            if low:
                break
        step *= 2
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return {
        "microbatch_size": low,
        "peak_bytes": tried[low][1],
        "peaks": {8: fits(model, precision, 8)[1]} if low >= 8 else {},
        "tried": [[size, *result] for size, result in sorted(tried.items())],
    }


def run_throughput(model: str, precision: str, budget_bytes: int, limit: int) -> dict[str, Any]:
    """Time micro-batches of many sizes; choose among k, k+1 and k+2 as training does."""
    cap(budget_bytes)
    plans = candidate_plans(BatchPlan.build(EFFECTIVE_BATCH_SIZE, limit))
    limit = min(limit, EFFECTIVE_BATCH_SIZE)
    sizes = {2**power for power in range(2, 11)} | {plan.microbatch_size for plan in plans} | {limit}
    trainer = Trainer(model, precision)
    rates = {size: samples_per_second(trainer, size) for size in sorted(sizes) if size <= limit}
    first = plans[0].microbatch_size
    best = max((plan.microbatch_size for plan in plans), key=rates.__getitem__)
    used = best if rates[best] > rates[first] / (1 - SMALLEST_GAIN) else first
    return {"samples_per_second": rates, "used": used, "share_of_best": rates[used] / max(rates.values())}


def samples_per_second(trainer: Trainer, size: int) -> float:
    """Return the rate of forward and backward passes, after one to warm up."""
    gc.collect()
    torch.cuda.empty_cache()
    batch = trainer.batch(size)
    trainer.window(batch)
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < 0.5:
        trainer.window(batch)
        torch.cuda.synchronize()
        count += 1
    return count * size / (time.perf_counter() - start)


def run_lightning(model: str, precision: str, budget_bytes: int, mode: str) -> dict[str, Any]:
    """Let Lightning's Tuner scale the batch size, with its defaults."""
    import lightning_case  # not counted, and not to be had by those who measure other methods

    start = time.perf_counter()
    cap(budget_bytes)
    found, sizes = lightning_case.scale_batch_size(build_task(config_of(model)), precision, mode)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"microbatch_size": found, "tries": len(sizes), "gpu_seconds": seconds, "wall_seconds": seconds}


def run_accelerate(model: str, precision: str, budget_bytes: int) -> dict[str, Any]:
    """Let accelerate's decorator find an executable batch size from 1024 down."""
    from accelerate.utils import find_executable_batch_size

    sizes: list[int] = []

    @find_executable_batch_size(starting_batch_size=LIMIT)
    def train(batch_size: int) -> int:
        sizes.append(batch_size)
        trainer = Trainer(model, precision)
        for _ in range(2):
            trainer.window(trainer.batch(batch_size))
            trainer.step()
        return batch_size

    start = time.perf_counter()
    cap(budget_bytes)
    found = train()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"microbatch_size": found, "tries": len(sizes), "gpu_seconds": seconds, "wall_seconds": seconds}


def in_child(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run a method in a process of its own and return what it measured."""
    context = forkserver_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, function.__name__, args))
    process.start()
    theirs.close()
    try:
        result: dict[str, Any] = ours.recv()
    except EOFError:
        result = {"error": "the process died"}
    process.join()
    return result


def _child(connection: Any, name: str, args: Any) -> None:
    try:
        connection.send(globals()[name](*args))
    except Exception as error:  # noqa: BLE001 -- another library's failure is a result
        connection.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})


def measure(
    model: str, precision: str, method: str, budget_bytes: int, known: dict[str, Any]
) -> dict[str, Any]:
    """Run one method on one case."""
    if method == "ours":
        return run_ours(model, precision, budget_bytes)
    if method == "truth":
        return in_child(run_truth, model, precision, budget_bytes, known["ours"]["microbatch_size"])
    if method == "throughput":
        return in_child(run_throughput, model, precision, budget_bytes, known["ours"]["microbatch_size"])
    if method == "accelerate":
        return in_child(run_accelerate, model, precision, budget_bytes)
    return in_child(run_lightning, model, precision, budget_bytes, method.removeprefix("lightning_"))


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield the cases in the order in which they matter."""
    for group in (
        ("ours", "truth", "throughput"),
        ("lightning_binsearch",),
        ("lightning_power", "accelerate"),
    ):
        for precision in options.precisions.split(","):
            for model in options.models.split(","):
                for method in group:
                    if method in options.methods.split(","):
                        yield model, precision, method


def run(options: argparse.Namespace) -> None:
    """Measure what is not in the file yet, until the time is up."""
    deadline = time.monotonic() + options.seconds
    known = load(options.out)
    forkserver_context(("torchvision",))
    total = in_child(total_memory)["total_bytes"]
    budget_bytes = int(0.9 * total) - 256 * 2**20 if options.budget_bytes is None else options.budget_bytes
    for model, precision, method in cases(options):
        case = known.setdefault((model, precision), {})
        if method in case or time.monotonic() > deadline:
            continue
        result = measure(model, precision, method, budget_bytes, case)
        case[method] = result
        line = {
            "model": model,
            "precision": precision,
            "method": method,
            "budget_bytes": budget_bytes,
            **result,
        }
        with Path(options.out).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            model,
            precision,
            method,
            {k: v for k, v in result.items() if not isinstance(v, (list, dict))},
            flush=True,
        )


def total_memory() -> dict[str, Any]:
    """Return the GPU's memory in bytes."""
    return {"total_bytes": torch.cuda.get_device_properties(DEVICE).total_memory}


def load(path: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what has been measured, by model and precision, then by method."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    if Path(path).exists():
        for text in Path(path).read_text().splitlines():
            line = json.loads(text)
            known.setdefault((line["model"], line["precision"]), {})[line["method"]] = line
    return known


def table(options: argparse.Namespace) -> None:
    """Print what was measured, and the figures over all cases."""
    known = load(options.out)
    print(
        "| model | | found | true | share | tries | estimate / peak | GPU s | wall s | plan / best | "
        "Lightning binsearch | power | accelerate |"
    )
    print("|" + "---|" * 13)
    ratios: dict[str, list[float]] = {"gpu": [], "wall": [], "share": [], "throughput": [], "tries": []}
    for (model, precision), case in known.items():
        ours, truth = case.get("ours"), case.get("truth")
        if ours is None or truth is None:
            continue
        share = ours["microbatch_size"] / truth["microbatch_size"]
        ratios["share"].append(share)
        ratios["tries"].append(ours["tries"])
        cells = [model, precision, ours["microbatch_size"], truth["microbatch_size"], f"{share:.1%}"]
        cells += [ours["tries"], f"{ours['estimated_peak_bytes'] / ours['peak_bytes']:.3f}"]
        cells += [f"{ours['gpu_seconds']:.1f}", f"{ours['wall_seconds']:.1f}"]
        if "throughput" in case:
            ratios["throughput"].append(case["throughput"]["share_of_best"])
            cells.append(f"{case['throughput']['share_of_best']:.1%}")
        else:
            cells.append("")
        for method in ("lightning_binsearch", "lightning_power", "accelerate"):
            other = case.get(method)
            if other is None or "error" in other:
                cells.append("" if other is None else other["error"][:40])
                continue
            cells.append(
                f"{other['microbatch_size']} in {other['gpu_seconds']:.0f} s, {other['tries']} tries"
            )
            if method == "lightning_binsearch":
                ratios["gpu"].append(other["gpu_seconds"] / ours["gpu_seconds"])
                ratios["wall"].append(other["wall_seconds"] / ours["wall_seconds"])
        print("| " + " | ".join(map(str, cells)) + " |")
    print()
    for name, values in ratios.items():
        if values:
            print(
                f"{name}: median {statistics.median(values):.3g}, least {min(values):.3g}, of {len(values)}"
            )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--out", required=True)
    runner.add_argument("--models", default=",".join(ucf101.FRAMES))
    runner.add_argument("--precisions", default=",".join(PRECISIONS))
    runner.add_argument("--methods", default=",".join(METHODS))
    runner.add_argument("--budget-bytes", type=int)
    runner.add_argument("--seconds", type=float, default=3600.0, help="start no case after this long")
    runner.set_defaults(do=run)
    printer = commands.add_parser("table")
    printer.add_argument("out")
    printer.set_defaults(do=table)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
