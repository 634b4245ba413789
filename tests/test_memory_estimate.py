from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from estimates import GIB, make_estimate
from hypothesis import example, given
from hypothesis import strategies as st

from tune_easytrain.memory_estimate import (
    BoundedMoment,
    Line,
    MemoryEstimate,
    PhaseEstimate,
    Segment,
    upper_envelope,
)

SIZES = (*range(1, 40), 63, 64, 65, 100, 257, 1000, 4096, 10**6)

lines = st.builds(Line, st.integers(-(2**40), 2**40), st.integers(0, 2**30))
moments = st.builds(
    BoundedMoment,
    live=st.builds(Line, st.integers(0, 2**36), st.integers(0, 2**30)),
    scratch=st.builds(Line, st.integers(0, 2**30), st.integers(0, 2**28)),
    most_bytes=st.sampled_from([2**20, 132 * 2**20, math.inf]),
)


def phase(*given_lines: Line, name: str = "backward", fixed_bytes: int = 0) -> PhaseEstimate:
    return PhaseEstimate.build(name, given_lines, [], fixed_bytes)


def estimate(*phases: PhaseEstimate) -> MemoryEstimate:
    return MemoryEstimate((Segment(None, phases),), "cuda")


@given(st.lists(lines, min_size=1, max_size=40))
def test_the_envelope_is_the_maximum_of_the_lines_at_every_size(given_lines: list[Line]) -> None:
    envelope = upper_envelope(given_lines)
    for size in SIZES:
        assert max(line.at(size) for line in envelope) == max(line.at(size) for line in given_lines)


@given(st.lists(lines, min_size=1, max_size=40))
def test_each_line_of_the_envelope_is_alone_at_the_top_somewhere(given_lines: list[Line]) -> None:
    envelope = upper_envelope(given_lines)
    starts = [Fraction(1)]
    for flat, steep in pairwise(envelope):
        slope = Fraction(int(steep.bytes_per_sample - flat.bytes_per_sample))
        starts.append(Fraction(int(flat.fixed_bytes - steep.fixed_bytes)) / slope)
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(("size", "expected"), [(1, 113), (9, 201), (10, 210), (11, 211), (1000, 1200)])
def test_scratch_of_a_kernel_grows_to_its_bound(size: int, expected: int) -> None:
    assert BoundedMoment(Line(100, 1), scratch=Line(2, 10), most_bytes=100).at(size) == expected


def rising(size: int, num_bytes: int, later_size: int, later_bytes: int) -> BoundedMoment:
    """A moment of a kernel with as many bytes at two sizes."""
    slope = (later_bytes - num_bytes) // (later_size - size)
    return BoundedMoment(Line(num_bytes - slope * size, slope), Line(0, 0), math.inf)


@given(st.lists(moments, min_size=1, max_size=30))
@example([rising(4, 90, 8, 90), rising(4, 90, 8, 130), rising(0, 0, 8, 120)])  # the second is highest at 6
def test_what_kernels_take_is_in_the_peak_of_a_phase(given_moments: list[BoundedMoment]) -> None:
    built = PhaseEstimate.build("forward", [Line(0, 1)], given_moments, 0)
    for size in SIZES[:-1]:
        highest = max(size, *(moment.at(size) for moment in given_moments))
        assert 0.98 * highest <= built.peak_bytes(size) <= highest + 1


def test_what_is_always_in_use_counts_beside_tensors_but_is_none() -> None:
    built = phase(Line(100, 10), Line(50, 30), fixed_bytes=7)
    assert [built.peak_bytes(size) for size in (1, 2, 3, 4)] == [117, 127, 147, 177]
    assert [built.tensor_bytes(size) for size in (1, 2, 3, 4)] == [110, 120, 140, 170]


def test_the_peak_is_that_of_the_highest_phase_with_what_allocators_waste() -> None:
    both = estimate(phase(Line(10**6, 10**5)), phase(Line(3 * 10**6, 0), name="optimizer"))
    tensor_bytes = [3 * 10**6, 3 * 10**6, 11 * 10**6]
    assert [both.tensor_bytes(size) for size in (1, 20, 100)] == tensor_bytes
    peaks = both.phase_peak_bytes(10)
    assert list(peaks) == ["backward", "optimizer"]
    assert peaks["optimizer"] == pytest.approx(1.5 * peaks["backward"], abs=2)
    assert both.peak_bytes(10) == peaks["optimizer"]
    assert both.peak_bytes(100) == both.phase_peak_bytes(100)["backward"]
    for device_type, least, most in (("cuda", 1.0, 1.02), ("cpu", 1.05, 1.2)):
        found = replace(both, device_type=device_type).peak_bytes(100)
        assert least <= found / tensor_bytes[2] <= most


def test_each_size_has_the_phases_of_its_segment() -> None:
    segments = tuple(
        Segment(largest, (phase(Line(fixed, 0)),)) for largest, fixed in ((4, 100), (8, 200), (None, 300))
    )
    laddered = MemoryEstimate(segments, "cuda")
    tensor_bytes = {size: laddered.tensor_bytes(size) for size in (1, 4, 5, 8, 9, 10**6)}
    assert tensor_bytes == {1: 100, 4: 100, 5: 200, 8: 200, 9: 300, 10**6: 300}


@given(
    given_lines=st.lists(lines, min_size=1, max_size=5),
    budget_bytes=st.integers(0, 2**42),
    limit=st.integers(1, 3000),
    ratio=st.floats(0.5, 2.0),
)
def test_the_largest_microbatch_is_the_last_that_fits(
    given_lines: list[Line], budget_bytes: int, limit: int, ratio: float
) -> None:
    some = estimate(phase(*given_lines))
    found = some.largest_microbatch(budget_bytes, limit, ratio=ratio)
    assert 0 <= found <= limit
    assert found == 0 or some.peak_bytes(found) * ratio <= budget_bytes
    assert found == limit or some.peak_bytes(found + 1) * ratio > budget_bytes


@pytest.mark.parametrize(
    ("budget_gib", "limit", "ratio", "expected"),
    [(10, 100, 1.0, 16), (10, 7, 1.0, 7), (2.4, 100, 1.0, 0), (2.5, 100, 1.0, 1), (10, 100, 2.0, 6)],
)
def test_the_largest_microbatch_of_two_gib_and_half_a_gib_a_sample(
    budget_gib: float, limit: int, ratio: float, expected: int
) -> None:
    assert make_estimate(2, 0.5).largest_microbatch(int(budget_gib * GIB), limit, ratio=ratio) == expected


@pytest.mark.parametrize("size", [0, -1])
def test_no_peak_below_one_sample(size: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1, got {size}"):
        estimate(phase(Line(1, 1))).peak_bytes(size)
