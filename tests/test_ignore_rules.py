"""Single lines; that whole files of them leave out what git leaves out is tested in test_packed_folder.py."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from tune_easytrain.ignore_rules import IgnoreRule, IgnoreRules


@pytest.mark.parametrize("line", ["", "   ", "# data", "[z-a]"])
def test_lines_that_say_nothing(line: str) -> None:
    assert IgnoreRule.parse(line) is None


def test_the_last_line_that_speaks_of_a_path_decides(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_bytes(b"*.bin\r\nruns/\n/top\n")
    (tmp_path / ".rayignore").write_text("!keep.bin\n")
    rules = IgnoreRules.load(
        PurePosixPath("sub"), tmp_path / ".gitignore", tmp_path / ".rayignore", tmp_path / "no"
    )
    verdicts = {
        (name, is_folder): rules.verdict(PurePosixPath("sub") / name, is_folder)
        for name, is_folder in [
            ("a.bin", False), ("x/a.bin", True), ("x/keep.bin", False), ("runs", True), ("runs", False),
            ("top", False), ("x/top", False),
        ]
    }  # fmt: skip
    assert list(verdicts.values()) == [True, True, False, True, None, True, None]
