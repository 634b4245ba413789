from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sequences
import torch
from nets import make_task, perceptron, zeros
from torch import Tensor
from torch.utils.data import Dataset

from tune_easytrain.task import Task
from tune_easytrain.worst_case import with_known_worst_case, worst_case_batch

META = torch.device("meta")


class Growing(Dataset[Tensor]):
    """Sample i has up to eight numbers, all of them i; the ninth and later ones must not be read."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Tensor:
        assert index < 8
        return torch.full(((index * 5) % 8 + 1,), float(index))


def task(**changes: Any) -> Task:
    return make_task(lambda: perceptron(4, 1), zeros(4), **changes)


def test_the_default_is_the_largest_of_the_first_eight_samples_repeated() -> None:
    batch = worst_case_batch(task(worst_case=None, train_data=Growing), 3)
    assert batch.equal(torch.full((3, 8), 3.0))


def test_fewer_than_eight_samples_are_enough() -> None:
    samples = [{"x": torch.zeros(2), "y": 0}, {"x": torch.ones(5), "y": 1}]
    batch = worst_case_batch(task(worst_case=None, train_data=lambda: samples), 2)
    assert batch["x"].equal(torch.ones(2, 5))
    assert batch["y"].tolist() == [1, 1]


def test_the_tasks_own_is_used_and_the_data_left_alone() -> None:
    batch = worst_case_batch(task(worst_case=lambda num_samples: torch.ones(num_samples, 4)), 5)
    assert batch.equal(torch.ones(5, 4))


def test_the_tasks_own_collate_makes_the_batch() -> None:
    def collate(samples: list[Tensor]) -> dict[str, Any]:
        return {"x": torch.stack(samples), "count": len(samples)}

    batch = worst_case_batch(task(worst_case=None, train_data=Growing, collate=collate), 3)
    assert (batch["x"].shape, batch["count"]) == ((3, 8), 3)


def test_it_is_made_on_the_device_where_it_can_be() -> None:
    made_on: list[str] = []

    def worst_case(num_samples: int) -> tuple[Tensor, list[str]]:
        batch = torch.zeros(num_samples, 4)
        made_on.append(batch.device.type)
        return batch, ["text"] * num_samples

    batch, texts = worst_case_batch(task(worst_case=worst_case), 3, META)
    assert (batch.device, batch.shape, texts) == (META, (3, 4), ["text"] * 3)
    assert made_on == ["meta"]


@pytest.mark.parametrize(
    "worst_case",
    [
        lambda num_samples: torch.from_numpy(np.ones((num_samples, 4))),
        lambda num_samples: torch.as_tensor(torch.ones(num_samples, 4).tolist()).double(),
        lambda num_samples: torch.ones(num_samples, int(torch.tensor(4.0).item())).double(),
    ],
)
def test_what_only_the_host_can_make_is_moved(worst_case: Any) -> None:
    batch = worst_case_batch(task(worst_case=worst_case), 3, META)
    assert (batch.device, batch.shape, batch.dtype) == (META, (3, 4), torch.float64)


def test_a_fault_of_the_tasks_own_is_told() -> None:
    def worst_case(num_samples: int) -> Tensor:
        raise KeyError("length")

    with pytest.raises(KeyError, match="length"):
        worst_case_batch(task(worst_case=worst_case), 3, META)


def test_data_is_moved_to_the_device() -> None:
    batch = worst_case_batch(task(worst_case=None, train_data=Growing), 3, META)
    assert (batch.device, batch.shape) == (META, (3, 8))


def test_of_samples_with_lengths_it_is_the_longest_repeated_and_no_other_is_read() -> None:
    data = sequences.Sequences([3, 5, 2, 4, 1, 1, 1, 1, 1, 9, 2])
    known = sequences.make_task([1], train_data=lambda: data)
    batch = worst_case_batch(known, 3)
    assert batch.equal(data[9].expand(3, 9))
    assert set(data.read) == {9}
    kept = with_known_worst_case(known)
    data.read.clear()
    assert worst_case_batch(kept, 2).equal(batch[:2])
    assert data.read == []
    own = with_known_worst_case(replace(known, worst_case=lambda m: torch.ones(m, 4)))
    assert worst_case_batch(own, 2).equal(torch.ones(2, 4))
