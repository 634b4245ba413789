"""Micro-batches of samples of like length beside micro-batches of a fixed number of samples.

    python benchmarks/length_batches.py --device cuda --out benchmarks/length_batches_h100.json
    python benchmarks/length_batches.py --device cpu --out benchmarks/length_batches_cpu.json

Training steps of a causal transformer on sequences whose lengths are drawn log-normally (median and sigma as
printed, cut off at the longest). All methods see the same samples in the same windows of E, and none holds
more padded tokens at once than `m` samples of the longest length:

- `longest`: m samples, padded to the longest of the data set, as where shapes are fixed.
- `fixed`: m samples, padded to the longest among them, as the batches of a `DataLoader` are.
- `grouped 1/16`: the window's samples by length; a micro-batch ends at m × longest tokens, or where its
  padding would be more than a 16th of that. 1/16 is the package's share; the others show what it does, and
  `tokens` cuts by tokens alone.

Tokens per second count no padding. The methods take turns, window by window, and the best time of each window
counts. Needs torch alone; no Ray, no pydantic. On a CPU one thread, since others may use the machine too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

from tune_easytrain import length_batches
from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.length_batches import EpochSamples, SampleLengths

SIGMAS = (0.5, 0.9)
PADDING_SHARES = {
    "tokens": 1e9,
    "grouped 1/4": 1 / 4,
    "grouped 1/8": 1 / 8,
    "grouped 1/16": 1 / 16,
    "grouped 1/32": 1 / 32,
}
NUM_DRAWN = 20_000
IGNORED = -100


@dataclass(frozen=True)
class Scale:
    """The model, its sequences, and the (E, m) that are measured."""

    num_layers: int
    width: int
    num_heads: int
    vocabulary: int
    median: int
    longest: int
    sizes: tuple[tuple[int, int], ...]
    num_windows: int
    num_rounds: int


SIZES = ((16, 16), (128, 32), (128, 16), (128, 8), (128, 4))

SCALES = {
    "cuda": Scale(12, 1024, 16, 32_000, 200, 2048, SIZES, 3, 2),
    "cpu": Scale(2, 128, 4, 1000, 40, 256, ((16, 16), (64, 8)), 3, 5),
}


class Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (samples, length, width) for the same."""
        heads = (
            self.qkv(self.first_norm(inputs)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        inputs = inputs + self.out(attended.transpose(1, 2).flatten(2))
        return inputs + self.down(functional.gelu(self.up(self.second_norm(inputs))))


class LanguageModel(nn.Module):
    """Tokens (samples, length) to logits of the next."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.tokens = nn.Embedding(scale.vocabulary, scale.width)
        self.positions = nn.Embedding(scale.longest, scale.width)
        self.blocks = nn.Sequential(*(Block(scale.width, scale.num_heads) for _ in range(scale.num_layers)))
        self.norm = nn.LayerNorm(scale.width)
        self.logits = nn.Linear(scale.width, scale.vocabulary, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        """Return (samples, length, vocabulary)."""
        places = torch.arange(batch.shape[1], device=batch.device)
        return self.logits(self.norm(self.blocks(self.tokens(batch) + self.positions(places))))


def draw_lengths(scale: Scale, sigma: float, seed: int = 0) -> list[int]:
    """Return lengths in tokens: log-normal around the median, from 8 to the longest, which is among them."""
    drawn = random.Random(seed)
    lengths = [round(scale.median * drawn.lognormvariate(0, sigma)) for _ in range(NUM_DRAWN)]
    lengths[0] = scale.longest
    return [min(scale.longest, max(8, length)) for length in lengths]


def microbatches_by_method(
    scale: Scale, lengths: Sequence[int], effective: int, limit: int
) -> dict[str, list[list[list[int]]]]:
    """Return each method's micro-batches: a list of windows, each a list of micro-batches of samples."""
    order = list(range(len(lengths)))
    random.Random(1).shuffle(order)
    plan, known = BatchPlan.build(effective, limit), SampleLengths(lengths)

    def cut(is_grouped: bool) -> list[list[list[int]]]:
        samples = EpochSamples(order, effective, known, is_grouped=is_grouped)
        return [list(map(list, samples.microbatches(index, plan))) for index in range(scale.num_windows)]

    methods = {"longest": cut(False), "fixed": cut(False)}
    packaged = length_batches._PADDING_SHARE
    for name, share in PADDING_SHARES.items():
        length_batches._PADDING_SHARE = share
        methods[name] = cut(True)
    length_batches._PADDING_SHARE = packaged
    return methods


class Trainer:
    """A model in the steady state of training."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = LanguageModel(scale).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.scale = scale

    def batch(self, lengths: Sequence[int], width: int) -> Tensor:
        """Return random tokens (samples, width) on the device, padded with 0 behind each length."""
        batch = torch.zeros(len(lengths), width, dtype=torch.long)
        for row, length in zip(batch, lengths, strict=True):
            row[:length] = torch.randint(1, self.scale.vocabulary, (length,))
        return (batch.pin_memory() if self.device.type == "cuda" else batch).to(
            self.device, non_blocking=True
        )

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean over tokens, in bf16 on a GPU."""
        targets = batch[:, 1:].masked_fill(batch[:, 1:] == 0, IGNORED)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = model(batch)[:, :-1]
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def window(self, batches: Iterator[tuple[Tensor, int]]) -> float:
        """Train one window of (batch, targets in it) and return the seconds it took."""
        weights: list[int] = []

        def read() -> Iterator[Tensor]:
            for batch, weight in batches:
                weights.append(weight)
                yield batch

        self.synchronize()
        start = time.perf_counter()
        accumulate_gradients(self.model, self.loss, read(), weight=lambda batch: weights[-1])
        self.optimizer.step()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    trainer: Trainer, scale: Scale, lengths: Sequence[int], effective: int, limit: int
) -> list[dict[str, Any]]:
    """Return one row per method."""
    known = SampleLengths(lengths)
    methods = microbatches_by_method(scale, lengths, effective, limit)

    def width_of(name: str, part: Sequence[int]) -> int:
        return scale.longest if name == "longest" else max(lengths[sample] for sample in part)

    def prepared(name: str, index: int) -> Iterator[tuple[Tensor, int]]:
        parts = methods[name][index]
        own = [[lengths[sample] for sample in part] for part in parts]
        # Made before the clock runs, as loader processes would.
        batches = [trainer.batch(each, width_of(name, part)) for each, part in zip(own, parts, strict=True)]
        return iter([(batch, sum(each) - len(each)) for batch, each in zip(batches, own, strict=True)])

    seconds = {name: [float("inf")] * scale.num_windows for name in methods}
    peaks = dict.fromkeys(methods, 0)
    for number in range(scale.num_rounds):
        for index in range(scale.num_windows):
            for name in methods:
                if name == "longest" and (number or index):  # the slowest is measured once
                    continue
                if trainer.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                took = trainer.window(prepared(name, index))
                seconds[name][index] = min(seconds[name][index], took)
                if trainer.device.type == "cuda":
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
    rows = []
    for name, windows in methods.items():
        if name == "longest":
            del windows[1:], seconds[name][1:]
        parts = [part for window in windows for part in window]
        num_tokens = sum(known.num_tokens(part) for part in parts)
        padded = sum(len(part) * width_of(name, part) for part in parts)
        rows.append(
            {
                "method": name,
                "E": effective,
                "m": limit,
                "microbatches_per_window": len(parts) / len(windows),
                "padding_share": 1 - num_tokens / padded,
                "tokens_per_second": num_tokens / sum(seconds[name]),
                "most_padded_tokens": max(len(part) * width_of(name, part) for part in parts),
                "peak_bytes": peaks[name] or None,
            }
        )
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / rows[1]["tokens_per_second"]
    return rows


def time_microbatch(trainer: Trainer, num_samples: int, length: int) -> float:
    """Return the median seconds of forward and backward of a micro-batch without padding."""
    batch = trainer.batch([length] * num_samples, length)
    times = [trainer.window(iter([(batch, num_samples * length)])) for _ in range(5)]
    return statistics.median(times[1:])


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="grouping by length beside fixed-size micro-batches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device, scale = torch.device(options.device), SCALES[options.device]
    name = "one CPU core"
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        torch.set_num_threads(1)
    trainer = Trainer(scale, device)
    limit = scale.sizes[0][1]
    full = time_microbatch(trainer, limit, scale.longest)
    tiny = time_microbatch(trainer, 1, 8)
    print(f"{name}: {scale}")
    print(f"a window of {limit} x {scale.longest} tokens takes {full:.4f} s, one of 1 x 8 takes {tiny:.4f} s")
    facts: dict[str, Any] = {"device": name, "torch": torch.__version__, "scale": vars(scale)}
    facts |= {"full_window_seconds": full, "tiny_window_seconds": tiny}
    rows: list[dict[str, Any]] = []
    for sigma in SIGMAS:
        lengths = draw_lengths(scale, sigma)
        print(
            f"\nlog-normal lengths: median {scale.median}, sigma {sigma}, at most {scale.longest}, ", end=""
        )
        print(f"mean {statistics.mean(lengths):.0f}")
        print(
            f"{'E':>5} {'m':>4}  {'method':<14} {'micro-batches':>13} {'padding':>8} {'tokens/s':>10} speedup"
        )
        for effective, m in scale.sizes:
            for row in measure(trainer, scale, lengths, effective, m):
                rows.append({"sigma": sigma, **row})
                print(
                    f"{effective:>5} {m:>4}  {row['method']:<14} {row['microbatches_per_window']:>13.1f} "
                    f"{row['padding_share']:>8.3f} {row['tokens_per_second']:>10.0f} {row['speedup']:>7.2f}",
                    flush=True,
                )
            if options.out is not None:
                options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
