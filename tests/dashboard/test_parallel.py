from __future__ import annotations

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
