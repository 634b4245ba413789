from __future__ import annotations

import re

import pytest

from tune_easytrain.accelerators import ACCELERATORS, find_accelerator
from tune_easytrain.errors import BadInputError


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H100", "H100 80GB"),
        ("h100 80gb", "H100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 80GB"),
        ("NVIDIA H100 NVL", "H100 NVL 94GB"),
        ("H200", "H200 141GB"),
        ("B200", "B200 180GB"),
        ("A100-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("a100 80 GiB", "A100 80GB"),
        ("a100_80g", "A100 80GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla T4", "T4 16GB"),
        ("l40s", "L40S 48GB"),
        ("NVIDIA A10G", "A10G 24GB"),
        ("A6000", "RTX A6000 48GB"),
        ("RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 96GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("rtx4090", "RTX 4090 24GB"),
        ("2080 ti", "RTX 2080 Ti 11GB"),
    ],
)
def test_names_are_read_as_people_and_drivers_write_them(written: str, name: str) -> None:
    assert find_accelerator(written).name == name


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_every_gpu_is_found_by_its_own_name(accelerator) -> None:
    assert find_accelerator(accelerator.name) is accelerator


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_torch_sees_a_little_less_than_the_vendor_sells(accelerator) -> None:
    sold_gib = int(re.search(r"(\d+)GB", accelerator.name)[1])
    assert 0.9 * sold_gib <= accelerator.total_bytes / 2**30 < sold_gib


def test_a_name_that_comes_in_two_sizes_is_refused_with_both() -> None:
    with pytest.raises(BadInputError, match="'A100 80GB' or 'A100 40GB'"):
        find_accelerator("A100")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("H100 40GB", "did you mean 'H100 80GB' or 'H100 NVL 94GB'?"),
        ("RTX 6000", "did you mean 'RTX 6000 Ada 48GB' or 'RTX PRO 6000 96GB'?"),
        ("A100 20GB", "did you mean 'A100 80GB' or 'A100 40GB'?"),
        ("H1O0", "did you mean 'H100 80GB'"),
        ("NVIDIA GeForce RTX 4091", "did you mean 'RTX 4090 24GB'"),
        ("toaster", "known: 'B200 180GB', 'H200 141GB'"),
        ("", "known: 'B200 180GB'"),
        ("NVIDIA GPU", "known: 'B200 180GB'"),
    ],
)
def test_an_unknown_name_is_refused_with_what_would_do(written: str, told: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(told)) as caught:
        find_accelerator(written)
    assert "--memory 24GiB" in str(caught.value)
