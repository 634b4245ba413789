"""True batches of a vision-language model against the same samples one by one, and what fits into 32 GiB.

    python benchmarks/true_batch.py --json benchmarks/true_batch_h100.jsonl
    python benchmarks/true_batch.py --markdown benchmarks/true_batch_h100.jsonl
    python benchmarks/true_batch.py --tiny --device cpu

LLaVA-1.5-7B's architecture with random weights, and the same tower with smaller decoders. The backbone is
frozen, in half precision; the projector is trained. Text is 64 tokens beside the image. Both ways get the
same images, of one size.

- `speed`: samples per second of forward and backward passes over a batch, and its peak of memory. `together`
  is one pass for all, `one by one` a forward and a backward pass for each sample, `one backward` a forward
  pass for each and one backward pass for all. TFLOP/s are of matrix products and convolutions, as the
  estimate counts them; `of peak` is their share of what a product of square matrices reaches here; `busy` is
  the share of time in which the GPU computes, the sum of its kernels' times. Where it is busy and near the
  peak the arithmetic bounds the speed, where it is busy and far from it the memory or the shapes do, and else
  the host that starts the kernels. `products` and `attention` are those kernels' shares of what all take.
  With `--compile` the decoder's layers are compiled by torch.compile.
- `table`: the largest micro-batch within the budget, by the estimate, by the estimate with
  `memory.checkpointing: blocks`, and as the probe confirms it on the device.

A row that is in the file already is not measured again. Needs transformers; no Ray, no pydantic.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import vlm_true_batch
from table_rows import keep_row, make_parser
from vlm_questions import longest_batch

import tune_easytrain as te
from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch import move_batch
from tune_easytrain.precision import autocast

TEXT_TOKENS = 64
BUDGET_BYTES = 32 * 2**30
SOURCE_RANGES = {224: "16–20", 336: "10–12", 448: "6–8"}
"""Of a table for a V100 with 32 GB, 002_9d55f1be0241a8d8.txt."""

MODELS = ("llava_1_5_7b", "llava_tinyllama_1b", "llava_smollm_360m")
WAYS = ("together", "one by one", "one backward")
LIMIT = 64
KERNELS = {"attention": ("flash", "fmha", "sdpa"), "products": ("gemm", "nvjet", "cutlass", "xmma", "conv")}
"""What names of kernels tell their kind by."""


def build_task(config: dict[str, Any]) -> te.Task:
    """The task of the example, with a training set that has a length and no data."""
    task = vlm_true_batch.build_task(config)
    task.train_data = lambda: range(10**6)
    task.lengths = None
    return task


def config_of(name: str, size: int, precision: str, lora_rank: int = 0) -> dict[str, Any]:
    """Return the trial's config of a model at an image size."""
    return {
        "model": {
            "type": name,
            "enable_true_batch": True,
            "unified_image_size": size,
            "freeze_backbone": True,
            "backbone_dtype": precision,
            "lora_rank": lora_rank,
        },
        "data": {"longest_text": TEXT_TOKENS},
    }


class Trainer:
    """A model on its device, and a batch of it, to be trained in one of the ways."""

    def __init__(
        self, config: dict[str, Any], num_samples: int, device: torch.device, is_compiled: bool
    ) -> None:
        size, self._precision = (config["model"][key] for key in ("unified_image_size", "backbone_dtype"))
        self._device = device
        torch.manual_seed(0)
        with device:
            self._model = vlm_true_batch.build_model(config)
        self._model.to(device).train()
        if is_compiled:
            for layer in self._model.llava.get_submodule("model.language_model.layers"):
                layer.compile()
        batch = longest_batch(num_samples, size, longest_text=TEXT_TOKENS)
        batch["pixels"].random_(generator=torch.Generator().manual_seed(0))
        self._batch = move_batch(batch, device)

    def step(self, way: str) -> None:
        """Compute the gradients of the batch once."""
        self._model.is_true_batch = way == "together"
        if way == "one backward":
            accumulate_gradients(
                self._model, self._loss, [self._batch], weight=vlm_true_batch.count_answer_tokens
            )
            return
        step = vlm_true_batch.train_step_batch if way == "together" else vlm_true_batch.train_step
        step(self._model, self._batch, self._loss)

    def _loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with autocast(self._device, self._precision):
            return vlm_true_batch.answer_loss(model, batch)


def measure_speed(what: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row for each of the ways."""
    precision, num_samples = what["precision"], what["num_samples"]
    config = config_of(what["model"], what["size"], precision, what["lora_rank"])
    estimate = te.estimate_memory(build_task, config, precision=precision)
    peak = measure_matrix_product(precision, device)
    trainer = Trainer(config, num_samples, device, what["compiled"])
    for way in WAYS:
        row = {**what, "way": way}
        try:
            seconds, peak_bytes = measure_step(lambda way=way: trainer.step(way), device)
        except torch.OutOfMemoryError:
            yield {**row, "error": "out of memory"}
            continue
        tflops = 1e-12 * estimate.flops_per_sample * num_samples / seconds
        busy = kernel_seconds(lambda way=way: trainer.step(way), device)
        yield {
            **row,
            "samples_per_second": num_samples / seconds,
            "peak_bytes": peak_bytes,
            "tflops": tflops,
            "share_of_peak": tflops / peak,
            "peak_tflops": peak,
            "busy_share": min(1.0, sum(busy.values()) / seconds) if busy else None,
            "kernel_seconds": busy,
        }


def measure_step(step: Callable[[], None], device: torch.device) -> tuple[float, int | None]:
    """Return the seconds of a step, the median after two to warm up, and its peak in bytes on a GPU."""
    is_cuda = device.type == "cuda"
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    for _ in range(2):
        step()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 3 and len(seconds) < 20):
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if is_cuda else None
    return sorted(seconds)[len(seconds) // 2], peak


def kernel_seconds(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the seconds that a GPU's kernels of each kind take in a step; empty on a CPU."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    seconds = dict.fromkeys((*KERNELS, "other"), 0.0)
    for event in profiler.key_averages():
        kinds = (kind for kind, names in KERNELS.items() if any(name in event.key for name in names))
        seconds[next(kinds, "other")] += 1e-6 * event.self_device_time_total
    return seconds


def measure_matrix_product(precision: str, device: torch.device) -> float:
    """Return the TFLOP/s of a product of square matrices of random numbers, the best of ten."""
    side = 8192 if device.type == "cuda" else 512
    one, other = (
        torch.randn(side, side, device=device, dtype=vlm_true_batch.DTYPES[precision]) for _ in range(2)
    )
    best = float("inf")
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        one @ other
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2e-12 * side**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_fit(name: str, size: int, precision: str, budget_bytes: int, device: str) -> dict[str, Any]:
    """Return how many samples fit into the budget: estimated, and confirmed by the probe."""
    config = config_of(name, size, precision)
    asked: dict[str, Any] = {"precision": precision, "device": device}
    estimate = te.estimate_memory(build_task, config, **asked)
    checkpointed = te.estimate_memory(build_task, config, checkpointing="blocks", **asked)
    row: dict[str, Any] = {
        "part": "table",
        "model": name,
        "size": size,
        "precision": precision,
        "budget_bytes": budget_bytes,
        "vision_tokens": (size // 14) ** 2,
        "source": SOURCE_RANGES.get(size, "–"),
        "estimated": estimate.largest_microbatch(budget_bytes, LIMIT),
        "checkpointed": checkpointed.largest_microbatch(budget_bytes, LIMIT),
    }
    try:
        found = te.find_microbatch(
            build_task, config, limit=LIMIT, device=device, budget_bytes=budget_bytes, precision=precision
        )  # fmt: skip
    except te.NotEnoughMemoryError as error:
        return {**row, "found": 0, "error": str(error).splitlines()[0]}
    return {
        **row,
        "found": found.microbatch_size,
        "bounded_by": found.bounded_by.value,
        "attempts": [[a.microbatch_size, a.outcome.value, a.peak_bytes, a.seconds] for a in found.attempts],
        "estimated_peak_bytes": estimate.peak_bytes(found.microbatch_size),
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Yield what each measurement is of, and how it is made."""
    names = ("tiny",) if options.tiny else tuple(options.models.split(","))
    size, sizes = (56, (28, 56)) if options.tiny else (336, tuple(SOURCE_RANGES))
    precisions = ("bf16",) if options.tiny else tuple(options.precisions.split(","))
    budget_bytes = 2**28 if options.tiny else BUDGET_BYTES
    device = torch.device(options.device)
    if options.part != "table":
        for precision in precisions:
            for name in names:
                what = {"part": "speed", "model": name, "size": size, "precision": precision}
                what |= {"num_samples": options.num_samples, "lora_rank": options.lora_rank}
                what["compiled"] = options.compile
                yield what, lambda what=what: measure_speed(what, device)
    if options.part != "speed":
        for size in sizes:
            what = {"part": "table", "model": names[0], "size": size, "precision": precisions[0]}
            arguments = (names[0], size, precisions[0], budget_bytes, device.type)
            yield what, lambda arguments=arguments: [measure_fit(*arguments)]


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print what was measured as tables in Markdown."""
    speed = [row for row in rows if row["part"] == "speed"]
    if speed:
        print_heading(
            "decoder precision batch way samples/s ratio peak,_GiB ratio TFLOP/s of_peak busy products "
            "attention"
        )
    for row in speed:
        key = ("model", "precision", "num_samples", "size", "lora_rank", "compiled")
        base = next(r for r in speed if r["way"] == "one by one" and all(r.get(k) == row.get(k) for k in key))
        way = f"{row['way']}, compiled" if row.get("compiled") else row["way"]
        cells = [row["model"], row["precision"], row["num_samples"], way]
        if "error" in row or "error" in base:
            cells += [row.get("error", "")]
        else:
            rate, gib = row["samples_per_second"], (row["peak_bytes"] or 0) / 2**30
            memory = [f"{gib:.1f}", f"{row['peak_bytes'] / base['peak_bytes']:.2f}"] if gib else ["–", "–"]
            cells += [f"{rate:.2f}", f"{rate / base['samples_per_second']:.2f}", *memory]
            cells += [f"{row['tflops']:.3g}", f"{row['share_of_peak']:.0%}"]
            cells += ["–" if row["busy_share"] is None else f"{row['busy_share']:.0%}"]
            kernels = row.get("kernel_seconds") or {}
            total = sum(kernels.values())
            cells += [f"{kernels[kind] / total:.0%}" if total else "–" for kind in ("products", "attention")]
        print("| " + " | ".join(map(str, cells)) + " |")
    fits = [row for row in rows if row["part"] == "table"]
    if fits:
        print()
        print_heading("size vision_tokens source estimated confirmed peak,_GiB estimated,_GiB checkpointed")
    for row in fits:
        peaks = {size: peak for size, _, peak, _ in row.get("attempts", [])}
        peak = (peaks.get(row["found"]) or 0) / 2**30
        cells = [row["size"], row["vision_tokens"], row["source"], row["estimated"], row["found"]]
        cells += [f"{peak:.2f}", f"{row.get('estimated_peak_bytes', 0) / 2**30:.2f}", row["checkpointed"]]
        print("| " + " | ".join(map(str, cells)) + " |")


def print_heading(names: str) -> None:
    """Print the first two lines of a table with columns of these names, their spaces written as _."""
    cells = [name.replace("_", " ") for name in names.split()]
    print("| " + " | ".join(cells) + " |\n" + "|" + "---|" * len(cells))


def load(path: Path | None) -> list[dict[str, Any]]:
    """Return what has been measured."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def main() -> None:
    """Measure, and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="only print the tables of this file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, which a CPU can train")
    parser.add_argument("--part", choices=("speed", "table"), help="default: both")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default="fp16,bf16")
    parser.add_argument("--num-samples", type=int, default=10, help="samples of a batch (default: 10)")
    parser.add_argument("--lora-rank", type=int, default=0, help="adapters of the decoder (default: none)")
    parser.add_argument("--compile", action="store_true", help="the decoder's layers by torch.compile")
    options = parser.parse_args()
    if options.markdown:
        print_tables(load(options.markdown))
        return
    rows = load(options.json)
    for what, measure in cases(options):
        if any(all(row.get(key, False) == value for key, value in what.items()) for row in rows):
            continue
        for row in measure():
            print(json.dumps(row), file=sys.stderr, flush=True)
            keep_row(row, options.json)
            rows.append(row)
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    print_tables(rows)


if __name__ == "__main__":
    main()
