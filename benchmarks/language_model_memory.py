"""The memory estimate beside the real peak of training a language model, all of it or with LoRA.

    python benchmarks/language_model_memory.py --json benchmarks/language_model_memory_h100.jsonl
    python benchmarks/language_model_memory.py --device cpu --model tiny --vocabulary 500 --length 32
    python benchmarks/language_model_memory.py --markdown benchmarks/language_model_memory_h100.jsonl

A Llama of Llama 3.2 1B's published shape with random weights (examples/lm_finetune.py), AdamW, clipping at
1: {all weights, LoRA of rank 16} × {no checkpointing, `blocks`} × {fp32, bf16} × micro-batches of 1 and 8
samples of 512 tokens. In bf16 what LoRA does not train is held in bf16; all else is in fp32 under autocast.

The estimate is made before the device is touched. The peak is that of one attempt of the probe (an optimizer
step, a window with gradients resident, evaluation, generation) in a process of its own, under the cap of a
trial. Needs transformers, and peft for LoRA; no Ray, no pydantic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from table_rows import keep_row, make_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import lm_finetune

from tune_easytrain.child_process import forkserver_context
from tune_easytrain.devices import device_name
from tune_easytrain.estimate import estimate_task
from tune_easytrain.memory import device_memory
from tune_easytrain.memory_budget import BudgetRequest, probed_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe_attempt import run_attempt
from tune_easytrain.strategies import with_strategies
from tune_easytrain.task import Task

CLIP_NORM = 1.0
LORA_RANK = 16
SIZES = (1, 8)
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Case:
    """One estimate; `lora_rank` 0 trains all weights."""

    model: str
    vocabulary: int
    length: int
    lora_rank: int
    checkpointing: str
    precision: Any

    @property
    def frozen_weights(self) -> str:
        """The number format of weights that are not trained."""
        return "bf16" if self.precision == "bf16" and self.lora_rank else "fp32"

    def task(self) -> Task:
        """Return the task as a trial trains it; it opens no data."""
        config = {
            "model": {
                "type": self.model,
                "lora_rank": self.lora_rank,
                "frozen_weights": self.frozen_weights,
            },
            "data": {"max_length": self.length, "vocabulary": self.vocabulary},
        }
        return with_strategies(lm_finetune.build_task(config), checkpointing=self.checkpointing)


def cases(model: str, vocabulary: int, length: int, precisions: Sequence[str] = PRECISIONS) -> list[Case]:
    """Return what is estimated."""
    return [
        Case(model, vocabulary, length, lora_rank, checkpointing, precision)
        for lora_rank in (0, LORA_RANK)
        for precision in precisions
        for checkpointing in ("none", "blocks")
    ]


def estimate(case: Case, device_type: Any) -> MemoryEstimate:
    """Return the case's estimate; no device is touched."""
    torch.set_num_threads(1)
    return estimate_task(case.task(), precision=case.precision, device=device_type, clip_norm=CLIP_NORM)


def measure(case: Case, size: int, device_type: str) -> dict[str, Any]:
    """Return what one attempt of the probe says of a micro-batch of `size` samples."""
    device = torch.device(device_type)
    memory = device_memory(device)
    budget_bytes = memory.budget_bytes(
        BudgetRequest(memory_fraction=0.9, device_share=1.0, memory_budget_bytes=None)
    )
    memory.cap(probed_bytes(budget_bytes))
    task = case.task()
    attempt = run_attempt(
        task, size, device=device, memory=memory, precision=case.precision, clip_norm=CLIP_NORM
    )
    with torch.device("meta"):
        counts = [(p.numel(), p.requires_grad) for p in task.model().parameters()]
    return {
        **asdict(case),
        "frozen_weights": case.frozen_weights,
        "num_parameters": sum(count for count, _ in counts),
        "num_trained": sum(count for count, is_trained in counts if is_trained),
        "microbatch_size": size,
        "outcome": str(attempt.outcome),
        "peak_bytes": attempt.peak_bytes,
        "seconds": round(attempt.seconds, 2),
        "budget_bytes": budget_bytes,
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": lm_finetune.import_package("transformers").__version__,
    }


def run_all(todo: Sequence[Case], sizes: Sequence[int], device_type: str, path: Path | None) -> list[Any]:
    """Estimate all, then measure one after the other; print and keep each row."""
    context = forkserver_context(("transformers", "peft"))
    with ProcessPoolExecutor(min(8, len(todo)), context) as pool:
        estimates = list(pool.map(estimate, todo, [device_type] * len(todo)))
    rows = []
    for case, estimated in zip(todo, estimates, strict=True):
        for size in sizes:
            with ProcessPoolExecutor(
                1, context
            ) as pool:  # a process, and with it a CUDA context, per attempt
                row = pool.submit(measure, case, size, device_type).result()
            row["estimated_peak_bytes"] = estimated.peak_bytes(size)
            keep_row(row, path)
            rows.append(row)
            print(markdown_row(row), flush=True)
    return rows


HEADING = """| trained | precision | checkpointing | m | estimate, GiB | peak, GiB | estimate / peak |
|---|---|---|---|---|---|---|"""


def markdown_row(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    trained = f"LoRA, rank {row['lora_rank']}" if row["lora_rank"] else "all weights"
    precision = row["precision"] + (", frozen weights bf16" if row["frozen_weights"] == "bf16" else "")
    if row["outcome"] == "fits":
        peak, share = f"{row['peak_bytes'] / 2**30:.2f}", f"{ratio(row):.3f}"
    else:
        peak, share = str(row["outcome"]).replace("_", " "), "–"
    return (
        f"| {trained} | {precision} | {row['checkpointing']} | {row['microbatch_size']} "
        f"| {row['estimated_peak_bytes'] / 2**30:.2f} | {peak} | {share} |"
    )


def ratio(row: dict[str, Any]) -> float:
    """Return the estimate over the real peak."""
    return float(row["estimated_peak_bytes"] / max(1, row["peak_bytes"]))


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print how far the estimate is off."""
    shares = [ratio(row) for row in rows if row["outcome"] == "fits"]
    if shares:
        print(f"\nestimate / peak: least {min(shares):.3f}, most {max(shares):.3f}, of {len(shares)}")


def main() -> None:
    """Measure, print the table, write JSON lines; or print the table of what was written."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=list(lm_finetune.SHAPES), default="1b")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="tokens the model knows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="micro-batches, in samples")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="these alone")
    parser.add_argument("--markdown", type=Path, help="print the table of this file, measure nothing")
    options = parser.parse_args()
    print(HEADING)
    if options.markdown:
        rows = [json.loads(line) for line in options.markdown.read_text().splitlines()]
        print("\n".join(map(markdown_row, rows)))
    else:
        todo = cases(options.model, options.vocabulary, options.length, options.precisions)
        rows = run_all(todo, options.sizes, options.device, options.json)
    print_summary(rows)


if __name__ == "__main__":
    main()
