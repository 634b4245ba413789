from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tune_easytrain import estimate
from tune_easytrain.estimate import estimate_task
from tune_easytrain.kernel_scratch import Scratch
from tune_easytrain.timeline import (
    MemoryRecorder,
    Timeline,
    UnknownValueError,
    join_peaks,
    join_timelines,
)

MIB = 2**20
META = torch.device("meta")


def record(code: Callable[[], Any], scratch: Any = lambda *_: None) -> Timeline:
    """What happens to memory while `code` runs, its result let go at the end."""
    with MemoryRecorder(scratch) as recorder, recorder.recording() as timeline:
        code()
    return timeline


def mib(num_mib: int = 1) -> Tensor:
    return torch.empty(num_mib * MIB, dtype=torch.uint8, device=META)


def test_a_storage_counts_from_its_first_tensor_to_its_last() -> None:
    def code() -> None:
        first = mib(1)
        second = mib(2)
        del first
        mib(4)
        del second

    assert record(code).changes == [MIB, 2 * MIB, -MIB, 4 * MIB, -4 * MIB, -2 * MIB]


def test_views_and_writing_in_place_take_nothing_and_keep_the_storage() -> None:
    def code() -> None:
        whole = mib(4)
        view = whole.view(4, MIB)[1:].t()
        whole.add_(1).mul_(whole)
        del whole
        other = mib(1)
        del view, other

    assert record(code).changes == [4 * MIB, MIB, -4 * MIB, -MIB]


def test_tensors_of_the_host_do_not_count() -> None:
    assert record(lambda: torch.zeros(1000).add(1)).changes == []


def test_what_was_there_before_a_phase_is_where_it_starts() -> None:
    with MemoryRecorder(lambda *_: None) as recorder:
        kept = mib(3)
        recorder.track(kept)  # counted already
        with recorder.recording() as first:
            mib(1)
        mib(7)
        with recorder.recording() as second:
            del kept
    assert (first.start_bytes, first.changes) == (3 * MIB, [MIB, -MIB])
    assert (second.start_bytes, second.changes) == (3 * MIB, [-3 * MIB])


def test_what_backward_saves_lives_until_it_has_run() -> None:
    def code() -> None:
        weight = torch.ones(1024, device=META, requires_grad=True)
        loss = weight.exp().sum()
        changes.append(len(timeline.changes))
        loss.backward()
        assert weight.grad is not None

    changes: list[int] = []
    with MemoryRecorder(lambda *_: None) as recorder, recorder.recording() as timeline:
        code()
    forward = timeline.changes[: changes[0]]
    assert sum(forward) == 4096 + 4096 + 4  # weight, its exponential, the sum
    assert sum(timeline.changes) == 0


def test_a_kernels_scratch_is_noted_where_it_runs() -> None:
    def scratch(operation: Any, args: Any, result: Any) -> Scratch | None:
        return Scratch(77) if operation is torch.ops.aten.mul.Tensor else None

    def code() -> None:
        ones = mib()
        product = ones * ones
        del ones, product

    assert record(code, scratch).changes == [MIB, MIB, Scratch(77), -MIB, -MIB]


@pytest.mark.parametrize("num_key_heads", [1, 2, 8])
def test_attention_counts_all_heads_though_some_share_their_keys(num_key_heads: int) -> None:
    query, keys = (torch.empty(3, heads, 64, 16, device="meta") for heads in (8, num_key_heads))
    timeline = record(lambda: torch.ops.aten._scaled_dot_product_flash_attention(query, keys, keys))
    assert timeline.num_flops == 2 * (2 * 3 * 8 * 64 * 64 * 16)


def test_a_number_that_only_the_device_will_know_is_not_read() -> None:
    with MemoryRecorder(lambda *_: None) as recorder:
        unknown = torch.empty(1, device=META)
        with pytest.raises(UnknownValueError, match="only the device will know"):
            unknown.item()
        with recorder.assuming(1.0):
            assert unknown.item() == 1.0
        with pytest.raises(UnknownValueError):
            bool(unknown > 0)


def test_a_known_number_is_read() -> None:
    with MemoryRecorder(lambda *_: None):
        assert torch.arange(5, device=META).sum().item() == 10
        assert torch.arange(5, device=META).cpu().tolist() == [0, 1, 2, 3, 4]
        assert torch.arange(5, device=META).nonzero().tolist() == [[1], [2], [3], [4]]


def test_what_is_no_whole_number_of_blocks_may_take_one_more() -> None:
    small, large = Timeline(1024, [200, -200, 512]), Timeline(1024, [400, -400, 512])
    phase = join_timelines("forward", small, large, (2, 4), 0)
    assert phase is not None
    assert [phase.tensor_bytes(size) for size in (2, 4, 8)] == [1024 + size * 100 + 512 for size in (2, 4, 8)]


def test_a_peak_that_moves_is_followed() -> None:
    """One thing early that is always there, many things late that grow: two peaks would miss the third."""
    small, large = Timeline(0, [51200, -51200, 1024, 2048]), Timeline(0, [51200, -51200, 2048, 4096])
    phase = join_timelines("forward", small, large, (2, 4), 0)
    assert phase is not None
    assert [phase.tensor_bytes(size) for size in (2, 4, 33, 34, 100)] == [51200, 51200, 51200, 52224, 153600]
    straight = join_peaks("forward", small, large, (2, 4), 0)
    assert straight.tensor_bytes(100) == 51200


def test_scratch_is_in_the_peak_up_to_its_bound_but_is_no_tensor() -> None:
    small = Timeline(0, [1024, Scratch(100, most_bytes=1000), -1024])
    large = Timeline(0, [2048, Scratch(200, most_bytes=1000), -2048])
    phase = join_timelines("forward", small, large, (2, 4), 10)
    assert phase is not None
    beside_tensors = [phase.peak_bytes(size) - phase.tensor_bytes(size) for size in (2, 4, 20, 40)]
    for found, expected in zip(beside_tensors, (110, 210, 1010, 1010), strict=True):
        assert expected <= found <= expected + 512
    unbounded = join_timelines("forward", Timeline(0, [Scratch(100)]), Timeline(0, [Scratch(200)]), (2, 4), 0)
    assert unbounded is not None
    assert unbounded.peak_bytes(1000) == pytest.approx(50_000, abs=512)
    assert unbounded.moments[0].most_bytes == math.inf


@pytest.mark.parametrize(
    "other", [[512], [512, -512, 512, 512], [512, 512, -512], [Scratch(1), -512, 512], [-512, 512, -512]]
)
def test_timelines_of_other_operations_do_not_join(other: list[int | Scratch]) -> None:
    one = Timeline(0, [512, -512, 512])
    assert join_timelines("forward", one, one, (2, 4), 0) is not None
    assert join_timelines("forward", one, Timeline(0, other), (2, 4), 0) is None


steps = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30)


@given(steps=steps, size=st.integers(2, 2000), data=st.data())
def test_two_timelines_give_the_exact_peak_at_any_size(
    steps: list[tuple[int, int]], size: int, data: st.DataObject
) -> None:
    """Allocations of `a + b × m` blocks, freed in any order."""
    order: list[tuple[int, int]] = []
    live: list[tuple[int, int]] = []
    for step in steps:
        live.append(step)
        order.append(step)
        while live and data.draw(st.booleans()):
            fixed, slope = live.pop(data.draw(st.integers(0, len(live) - 1)))
            order.append((-fixed, -slope))
    order = [step for step in order if step != (0, 0)]

    def at(num_samples: int) -> Timeline:
        return Timeline(0, [512 * (fixed + slope * num_samples) for fixed, slope in order])

    phase = join_timelines("forward", at(2), at(4), (2, 4), 0)
    assert phase is not None
    in_use = [0]
    for change in at(size).changes:
        assert isinstance(change, int)
        in_use.append(in_use[-1] + change)
    assert phase.tensor_bytes(size) == max(in_use)


def swin3d() -> tuple[Callable[[], nn.Module], Callable[[int], Any]]:
    video = pytest.importorskip("torchvision.models.video")
    swin = video.swin_transformer
    return (
        lambda: swin.SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=16,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=[4, 4, 4],
            num_classes=5,
        ),
        nets.zeros(3, 8, 32, 32),
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: (nets.conv_net, nets.zeros(3, 32, 32)), id="convolutions"),
        pytest.param(lambda: (nets.encoder, nets.zeros(48, 64)), id="transformer"),
        pytest.param(lambda: (nets.tiny_decoder, nets.tokens(128)), id="decoder"),
        pytest.param(lambda: (lambda: nets.Recurrent("LSTM"), nets.zeros(16, 32)), id="recurrent"),
        pytest.param(swin3d, id="swin3d"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_traces_at_two_and_four_say_what_a_trace_at_300_does(
    make: Any, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = nets.make_task(*make(), optimizer=nets.adam)
    joined = estimate_task(task, precision=precision)
    monkeypatch.setattr(estimate, "_SIZES", (2, 300))
    at_300 = estimate_task(task, precision=precision)
    assert len(joined.segments) == len(at_300.segments) == 1
    assert joined.tensor_bytes(300) == pytest.approx(at_300.tensor_bytes(300), rel=1e-6)
    for phase, num_bytes in at_300.phase_peak_bytes(300).items():
        assert joined.phase_peak_bytes(300)[phase] == pytest.approx(num_bytes, rel=1e-6)
