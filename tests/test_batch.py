from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.batch import count_samples, iterate_tensors, move_batch, split_batch


class Pair(NamedTuple):
    left: Any
    right: Any


def nested(num_samples: int) -> dict[str, Any]:
    ids = torch.arange(num_samples)
    return {
        "clip": ids[:, None].expand(-1, 3),
        "labels": (ids, [ids + 100]),
        "pair": Pair(ids, "kept"),
        "names": [str(i) for i in range(num_samples)],
        "scale": torch.tensor(2.0),
        "fps": 25,
    }


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(5, 2),
        (torch.zeros(5), torch.zeros(5)),
        {"scale": torch.tensor(1.0), "x": torch.zeros(5)},
        [{"x": Pair("text", torch.zeros(5, 1, 1))}],
    ],
)
def test_samples_are_the_first_dimension_of_the_first_tensor_that_has_one(batch: Any) -> None:
    assert count_samples(batch) == 5


@pytest.mark.parametrize("batch", ["text", {"fps": 25}, torch.tensor(3.0)])
def test_a_batch_without_such_a_tensor_asks_for_a_weight(batch: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        count_samples(batch)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum))
def test_parts_hold_every_sample_once_and_in_order(sizes: list[int]) -> None:
    batch = nested(sum(sizes))
    parts = list(split_batch(batch, sizes))
    assert [len(part["clip"]) for part in parts] == sizes
    assert torch.cat([part["clip"] for part in parts]).equal(batch["clip"])
    assert torch.cat([part["labels"][1][0] for part in parts]).equal(batch["labels"][1][0])
    assert [name for part in parts for name in part["names"]] == batch["names"]
    assert torch.cat([part["pair"].left for part in parts]).equal(batch["pair"].left)


def test_what_is_not_per_sample_is_repeated_in_every_part() -> None:
    for part in split_batch(nested(4), [1, 3]):
        assert part["scale"].item() == 2.0
        assert part["fps"] == 25
        assert isinstance(part["pair"], Pair)
        assert part["pair"].right == "kept"


@pytest.mark.parametrize("sizes", [[3, 3], [2], [6, -1], []])
def test_sizes_that_do_not_add_up_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="do not add up to the batch's 5 samples"):
        list(split_batch(torch.zeros(5), sizes))


def test_moving_keeps_the_nesting_and_moves_every_tensor() -> None:
    moved = move_batch(nested(3), torch.device("meta"))
    assert {tensor.device.type for tensor in iterate_tensors(moved)} == {"meta"}
    assert isinstance(moved["pair"], Pair)
    assert moved["names"] == ["0", "1", "2"]
    assert [tensor.shape for tensor in iterate_tensors(moved)] == [
        t.shape for t in iterate_tensors(nested(3))
    ]
