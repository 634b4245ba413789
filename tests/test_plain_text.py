from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.plain_text import is_file_name, printable

ANY_TEXT = st.text(st.characters())


@given(ANY_TEXT)
def test_what_is_printed_has_nothing_in_it_that_a_terminal_obeys(text: str) -> None:
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    shown.encode()  # so that no stream fails to write it


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("over\rwritten", r"over\rwritten"),
        ("\x9b2J", r"\x9b2J"),
        ("right\u202eleft", r"right\u202eleft"),
        ("a\tb\nc – ü [red]", "a\tb\nc – ü [red]"),
    ],
)
def test_how_it_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(ANY_TEXT)
def test_a_file_name_stays_in_its_folder(name: str) -> None:
    if is_file_name(name):
        path = Path("/folder") / name
        assert (path.parent, path.name) == (Path("/folder"), name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\0", "a\nb", "\x1b[2J", "x" * 300, "\udcff"]
)
def test_what_is_no_file_name(name: Any) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize("name", ["trial_00001.jsonl", "-rf", "..x", "x" * 255, "α β", "~", "$(id)"])
def test_what_is_one(name: str, tmp_path: Path) -> None:
    assert is_file_name(name)
    (tmp_path / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]
