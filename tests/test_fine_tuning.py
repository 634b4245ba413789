from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tune_easytrain.errors import BadInputError
from tune_easytrain.fine_tuning import FineTuning, default_weights, possible_changes
from tune_easytrain.language_models import find_language_model

FULL = FineTuning(model=find_language_model("7b"), task="classification")
LORA = replace(FULL, method="lora", weights="bf16")


def options(way: FineTuning) -> list[list[str]]:
    return [[change.option for change in kind] for kind in possible_changes(way)]


def test_trained_weights_are_fp32_and_frozen_ones_what_is_computed_in() -> None:
    assert default_weights("full", "bf16") == default_weights("full", "fp32") == "fp32"
    assert default_weights("lora", "bf16") == "bf16"
    assert default_weights("lora", "fp32") == "fp32"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"task": "translation"},
            "--task: unknown name 'translation'; valid: classification, generation, qa",
        ),
        ({"method": "qlora"}, "--method: unknown name 'qlora'; valid: full, lora"),
        ({"precision": "fp16"}, "--precision: unknown name 'fp16'; valid: bf16, fp32"),
        ({"weights": "int8"}, "--weights: unknown name 'int8'; valid: bf16, fp32"),
        ({"sharding": "zero2"}, "--sharding: unknown name 'zero2'; valid: none, optimizer, full"),
        ({"sharding": "full"}, "--sharding full: there is one device"),
        ({"precision": "fp32", "weights": "bf16"}, "--weights bf16 computes in bf16"),
        ({"sequence_length": 4097}, "--sequence-length 4097: Llama 2 7B takes at most 4096 tokens"),
    ],
)
def test_what_cannot_be_is_told_with_what_can(values: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        replace(FULL, **values)


def test_changes_are_tried_in_the_order_that_is_promised() -> None:
    assert options(FULL) == [
        ["--checkpointing"],
        ["--method lora --weights bf16"],
        ["--precision bf16 --weights bf16"],
        ["--sharding full --devices 2", "--sharding full --devices 4", "--sharding full --devices 8"],
        ["--sequence-length 256", "--sequence-length 128"],
    ]


def test_what_is_so_already_is_no_change() -> None:
    way = replace(LORA, checkpointing=True, sharding="full", num_devices=4, sequence_length=100)
    assert options(way) == [["--sharding full --devices 8"]]
    assert options(replace(LORA, checkpointing=True, num_devices=8, sequence_length=128)) == [
        ["--sharding full --devices 8"],
        ["--sequence-length 64"],
    ]


def test_every_change_is_a_way_of_its_own() -> None:
    for start in (FULL, LORA, replace(FULL, precision="fp32"), replace(FULL, weights="bf16")):
        changed = [change.apply(start) for kind in possible_changes(start) for change in kind]
        assert len({start, *changed}) == len(changed) + 1


@pytest.mark.parametrize(
    ("way", "told"),
    [
        (FULL, "bf16 autocast over fp32 weights"),
        (LORA, "frozen weights in bf16, adapters in fp32"),
        (replace(FULL, precision="fp32"), "; fp32;"),
        (replace(FULL, weights="bf16"), "without fp32 weights"),
        (replace(FULL, sharding="optimizer", num_devices=2), "2 devices that split optimizer state"),
    ],
)
def test_formats_and_sharding_are_told(way: FineTuning, told: str) -> None:
    assert told in way.describe()
