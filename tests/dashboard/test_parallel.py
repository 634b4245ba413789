from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.parallel import Axis, read_brush


def axis(*values: Any) -> Axis:
    found = Axis.of("x", [{"x": value} for value in values])
    assert found is not None
    return found


def test_numbers_stand_where_they_are_and_words_side_by_side() -> None:
    assert [axis(10, 20, 30).place(value) for value in (10, 20, 30, None)] == [0.0, 0.5, 1.0, None]
    assert [axis("a", "b", "c").place(value) for value in "abc"] == [0.0, 0.5, 1.0]
    assert axis(1e-4, 1e-2).place(1e-3) == pytest.approx(0.5)  # logarithmic, as its ends are far apart
    assert axis(True, False).values == ("true", "false")


def test_an_axis_is_logarithmic_where_values_are_far_apart_or_were_drawn_so() -> None:
    assert axis(1, 29).place(5) == pytest.approx(4 / 28)
    assert axis(1, 5.5, 30).place(30**0.5) == pytest.approx(0.5)
    drawn = Axis.of("x", [{"x": 0.01}, {"x": 0.04}], "loguniform")
    assert drawn is not None
    assert drawn.place(0.02) == pytest.approx(0.5)
    assert axis(0, 100).place(50) == 0.5  # zero has no logarithm


def test_a_listed_key_is_labelled_where_it_has_values() -> None:
    assert [text for _, text in axis(16, 64, 32, 16).labels()] == ["16", "32", "64"]
    assert [text for _, text in axis(0, 1).labels()] == ["0", "1"]
    many = Axis.of("x", [{"x": 100 + number} for number in range(40)], "")
    assert many is not None
    labels = many.labels()
    assert {text for _, text in labels} <= {str(100 + number) for number in range(40)}
    assert (labels[0][1], labels[-1][1]) == ("100", "139")
    places = [place for place, _ in labels]
    assert min(b - a for a, b in itertools.pairwise(places)) >= 0.07


def test_what_was_measured_is_labelled_at_even_distances() -> None:
    found = axis(*(0.5 + 0.01 * number for number in range(41)))
    assert [text for _, text in found.labels()] == ["0.5", "0.6", "0.7", "0.8", "0.9"]
    assert [place for place, _ in found.labels()] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(("peak", "title"), [(3 * 2**30, "GiB"), (300 * 2**20, "MiB"), (200, "B")])
def test_memory_is_in_the_unit_that_fits(peak: int, title: str) -> None:
    found = Axis.of("peak_memory_bytes", [{"peak_memory_bytes": peak}, {"peak_memory_bytes": peak // 2}])
    assert found is not None
    assert found.title == f"peak memory ({title})"
    assert found.told(peak) in ("3", "300", "200")


def test_a_long_word_is_shortened_in_the_middle() -> None:
    assert [text for _, text in axis("r2plus1d_18_kinetics_400", "s3d").labels()] == [
        "r2plus1d_…etics_400", "s3d",
    ]  # fmt: skip


def test_an_axis_where_nothing_differs_is_left_out() -> None:
    assert Axis.of("x", [{"x": 3}, {"x": 3}, {"x": None}, {}]) is None
    assert Axis.of("x", [{"x": "a"}]) is None
    assert Axis.of("x", [{"x": float("nan")}, {"x": 1.0}]) is None


def test_a_part_of_an_axis_holds_what_stands_there() -> None:
    numbers, words = axis(0, 50, 100), axis("a", "b", "c")
    assert numbers.between(0.25, 2.0) == [25.0, 100.0]
    assert [numbers.holds(value, [25.0, 100.0]) for value in (0, 25, 100, None)] == [False, True, True, False]
    assert words.between(0.4, 1.0) == ["b", "c"]
    assert [words.holds(value, ["b", "c"]) for value in ("a", "b", None)] == [False, True, False]
    assert not numbers.holds(3, ["x", {}])


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", json.dumps({"x": 3}), "[" * 100_000])
def test_a_brush_that_cannot_be_read_is_none(text: str) -> None:
    assert read_brush(Address("demo", "parallel", query={"brush": text})) == {}


def test_a_brush_is_read() -> None:
    assert read_brush(Address("demo", "parallel", query={"brush": '{"x": [1, 2]}'})) == {"x": [1, 2]}
