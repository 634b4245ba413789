from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.dashboard.figure import build_figure, pareto_front, plain

Mode = Literal["min", "max"]
POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30)
MODES = st.sampled_from(["min", "max"])


def beats(a: tuple[float, float], b: tuple[float, float], modes: tuple[Mode, Mode]) -> bool:
    signs = [1 if mode == "max" else -1 for mode in modes]
    gains = [sign * (x - y) for sign, x, y in zip(signs, a, b, strict=True)]
    return min(gains) >= 0 and max(gains) > 0


@given(POINTS, st.tuples(MODES, MODES))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]], modes: tuple[Mode, Mode]) -> None:
    front = {points[place] for place in pareto_front(points, modes)}
    assert front == {p for p in points if not any(beats(other, p, modes) for other in points)}


def test_plotly_obeys_no_text_of_a_trial() -> None:
    assert plain("<b>x</b> & \x1b") == "&lt;b&gt;x&lt;/b&gt; &amp; \\x1b"
    figure = build_figure([], x={"title": "<i>"})
    assert figure["layout"]["xaxis"]["title"]["text"] == "&lt;i&gt;"


@pytest.mark.parametrize("modes", [("min", "max"), ("max", "min")])
def test_of_equal_points_one_is_enough(modes: tuple[Mode, Mode]) -> None:
    assert len(pareto_front([(1, 1), (1, 1)], modes)) == 1
