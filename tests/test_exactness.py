from __future__ import annotations

from typing import Literal

import pytest

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import InexactBatchError
from tune_easytrain.exactness import BatchCoupling, check_exactness

Kind = Literal["batch_norm", "sync_batch_norm", "loss"]


def plan(limit: int, num_workers: int = 1) -> BatchPlan:
    """Twenty-four samples, at most `limit` of them at a time."""
    return BatchPlan.build(24, limit, num_workers=num_workers)


@pytest.mark.parametrize(
    ("kind", "limit", "num_workers", "is_exact"),
    [
        ("batch_norm", 24, 1, True),
        ("batch_norm", 12, 1, False),
        ("batch_norm", 12, 2, False),
        ("sync_batch_norm", 12, 2, True),
        ("sync_batch_norm", 6, 2, False),
        ("loss", 24, 1, True),
        ("loss", 23, 1, False),
        ("loss", 24, 2, False),
    ],
)
def test_what_sees_the_whole_window_at_once_is_exact(
    kind: Kind, limit: int, num_workers: int, is_exact: bool
) -> None:
    coupling = BatchCoupling(kind, "it")
    assert coupling.is_exact(plan(limit, num_workers)) is is_exact
    assert bool(check_exactness(plan(limit, num_workers), coupling, "warn")) is not is_exact


@pytest.mark.parametrize(
    ("kind", "limit", "num_workers", "said"),
    [
        ("batch_norm", 12, 1, "it sees at most 12 samples at a time; exact: GroupNorm, or one micro-batch ("),
        (
            "batch_norm", 6, 2,
            "it sees at most 6 samples of one worker at a time; "
            "exact: GroupNorm, or SyncBatchNorm with one micro-batch per worker (",
        ),
        ("sync_batch_norm", 6, 2, "6 samples at a time; exact: GroupNorm, or one micro-batch per worker ("),
        ("loss", 12, 1, "exact: one micro-batch ("),
        ("loss", 12, 2, "exact: one micro-batch per worker, one worker ("),
    ],
)  # fmt: skip
def test_the_warning_is_one_line_with_the_sizes_and_what_would_be_exact(
    kind: Kind, limit: int, num_workers: int, said: str
) -> None:
    warning = check_exactness(plan(limit, num_workers), BatchCoupling(kind, "it"), "warn")
    assert warning.startswith("gradients are not equal to one batch of 24: it sees")
    assert said in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("limit", "num_workers", "is_exact"), [(24, 1, True), (9, 1, True), (8, 2, True), (7, 1, False)]
)
def test_a_loss_within_groups_is_exact_where_micro_batches_keep_them(
    limit: int, num_workers: int, is_exact: bool
) -> None:
    coupling = BatchCoupling("loss", "it", group_size=8)
    grouped = BatchPlan.build(24, limit, num_workers=num_workers, group_size=8)
    assert coupling.is_exact(grouped) is is_exact
    assert not coupling.is_exact(plan(9))  # which knows of no groups
    assert not BatchCoupling("batch_norm", "it", group_size=8).is_exact(BatchPlan.build(24, 8, group_size=8))
    if not is_exact:
        assert "exact: micro-batches of at least 8 samples (" in check_exactness(grouped, coupling, "warn")


def test_required_exactness_is_an_error_in_place_of_the_warning() -> None:
    coupling = BatchCoupling("batch_norm", "BatchNorm2d (bn)")
    assert check_exactness(plan(24), coupling, "required") == ""
    with pytest.raises(
        InexactBatchError, match=r"batch\.exact: required, but gradients are not equal .* BatchNo"
    ):
        check_exactness(plan(12), coupling, "required")


def test_without_a_plan_or_a_coupling_there_is_nothing_to_say() -> None:
    assert check_exactness(None, BatchCoupling("loss", "it"), "required") == ""
    assert check_exactness(plan(1), None, "required") == ""
