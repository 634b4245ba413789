"""The rule of 004_9e95472cdca4d1f3.txt, number by number."""

from __future__ import annotations

import pytest

from tune_easytrain.errors import BadInputError
from tune_easytrain.language_models import LANGUAGE_MODELS
from tune_easytrain.rule_of_thumb import apply_rule_of_thumb

GB = 10**9
SOURCE = {  # the batch sizes that the source's last loop prints, for classification
    "7b": {8: 16, 16: 32, 24: 32, 40: 64},
    "13b": {8: 8, 16: 16, 24: 16, 40: 32},
    "30b": {8: 4, 16: 8, 24: 8, 40: 16},
}


@pytest.mark.parametrize(
    ("model", "memory", "batch_size"),
    [(model, memory, size) for model, cells in SOURCE.items() for memory, size in cells.items()],
)
def test_it_gives_the_twelve_numbers_of_the_source(model: str, memory: int, batch_size: int) -> None:
    rule = apply_rule_of_thumb(model, "classification", memory * GB)
    assert rule.batch_size == batch_size
    assert rule.accumulation_steps(32) == max(1, 32 // batch_size)  # the sizes are powers of two


def test_memory_per_sample_depends_on_the_size_and_the_task() -> None:
    per_sample = [
        apply_rule_of_thumb(size, "classification", GB).bytes_per_sample for size in LANGUAGE_MODELS
    ]
    assert per_sample == [GB // 10, GB // 5, 4 * GB // 10, 8 * GB // 10, 3 * GB // 2, 3 * GB]
    tasks = [apply_rule_of_thumb("7b", task, GB).bytes_per_sample for task in ("generation", "qa")]
    assert tasks == [6 * GB // 10, 48 * GB // 100]


def test_steps_are_rounded_up_so_that_no_sample_is_lost() -> None:
    rule = apply_rule_of_thumb("7b", "classification", 16 * GB)
    assert rule.batch_size == 32
    assert rule.accumulation_steps(48) == 2  # the source divides and drops the rest: 1
    assert rule.as_json((48, 64))["accumulation_steps"] == {"48": 2, "64": 2}


def test_it_says_one_where_nothing_fits_and_what_it_leaves_out() -> None:
    rule = apply_rule_of_thumb("70b", "generation", GB)
    assert rule.batch_size == 1
    assert "leaves out what weights, gradients and optimizer state take" in " ".join(rule.describe((32,)))


@pytest.mark.parametrize(
    ("model", "task", "told"), [("8b", "qa", "1b, 3b, 7b"), ("7b", "vqa", "classification")]
)
def test_what_the_rule_does_not_know_is_no_default(model: str, task: str, told: str) -> None:
    with pytest.raises(BadInputError, match=f"valid: {told}"):
        apply_rule_of_thumb(model, task, GB)
