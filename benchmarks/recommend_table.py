"""The table of docs/recommend.md: what fits by a rule of thumb, and what fits by the estimate.

    python benchmarks/recommend_table.py

Three sizes of language models, classification of 512 tokens, an effective batch size of 32. Traced on a CPU
without weights, in about a minute; writes benchmarks/recommend_table.json and the table between the page's
two marks. Memory is in GB, as the rule counts it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from tune_easytrain.fine_tuning import FineTuning, default_weights
from tune_easytrain.fine_tuning_task import estimate_fine_tuning, resident_memory
from tune_easytrain.language_models import find_language_model
from tune_easytrain.recommendation import Memory, build_sizing
from tune_easytrain.rule_of_thumb import apply_rule_of_thumb

ROOT = Path(__file__).resolve().parents[1]
JSON = ROOT / "benchmarks/recommend_table.json"
PAGE = ROOT / "docs/recommend.md"
MARKS = ("<!-- benchmarks/recommend_table.py writes this table -->", "<!-- end of the table -->")

MODELS = ("7b", "13b", "30b")
MEMORY_GB = (8, 16, 24, 40)
TASK = "classification"
TARGET = 32
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"method": "lora"},
    "LoRA, checkpointing": {"method": "lora", "checkpointing": True},
}
"""Ways to fine-tune by the heading of their column."""


def build_way(model: str, heading: str) -> FineTuning:
    """Return one way in the formats that the command takes by default."""
    values = WAYS[heading]
    weights = default_weights(values.get("method", "full"), "bf16")
    return FineTuning(model=find_language_model(model), task=TASK, weights=weights, **values)


def build_rows(models: Sequence[str] = MODELS) -> Iterator[dict[str, Any]]:
    """Yield a row for each model and size of memory."""
    for model in models:
        ways = {heading: build_way(model, heading) for heading in WAYS}
        traced = {name: (way, resident_memory(way), estimate_fine_tuning(way)) for name, way in ways.items()}
        for memory_gb in MEMORY_GB:
            memory = Memory(memory_gb * 10**9)
            rule = apply_rule_of_thumb(model, TASK, memory.total_bytes)
            row: dict[str, Any] = {
                "model": model,
                "memory_gb": memory_gb,
                "rule of thumb": {
                    "microbatch_size": rule.batch_size,
                    "accumulation_steps": rule.accumulation_steps(TARGET),
                },
            }
            for heading, (way, resident, estimate) in traced.items():
                sizing = build_sizing(way, resident, estimate, memory)
                plan = sizing.plan(TARGET)
                row[heading] = {
                    "least_bytes": sizing.least_bytes,
                    "microbatch_limit": sizing.largest,
                    "microbatch_size": 0 if plan is None else plan.microbatch_size,
                    "accumulation_steps": 0 if plan is None else plan.accumulation_steps,
                }
            yield row


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page's table of the rows."""
    headings = ["model", "memory", "rule of thumb", *WAYS]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for row in rows:
        cells = [row["model"], f"{row['memory_gb']} GB", *(_cell(row[name]) for name in headings[2:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(part: dict[str, int]) -> str:
    if part["microbatch_size"]:
        return f"{part['microbatch_size']} × {part['accumulation_steps']}"
    return f"no: {part['least_bytes'] / 1e9:.0f} GB"


def main() -> None:
    """Trace, and write the JSON and the page."""
    rows = list(build_rows())
    JSON.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    begin, end = MARKS
    page = PAGE.read_text()
    before, after = page[: page.index(begin)], page[page.index(end) :]
    PAGE.write_text(f"{before}{begin}\n{as_markdown(rows)}\n{after}")


if __name__ == "__main__":
    main()
