from __future__ import annotations

from pathlib import Path

import pytest
from made_studies import Trained, make_run_of, make_study

from tune_easytrain.cli import app, main

pytest.importorskip("scipy")
pytest.importorskip("plotly")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_study(
        tmp_path, [Trained(size, seed, 0.9 + 0.001 * seed) for size in (32, 64) for seed in range(2)]
    ).run_dir


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["tune-easytrain", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_it_writes_a_page_or_markdown_or_prints(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, run_dir, "-o", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Plotly.newPlot" in page
    assert call(monkeypatch, run_dir, "-o", tmp_path / "report.md", "--price", 2) == 0
    assert "cost at 2 an hour" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    assert call(monkeypatch, run_dir) == 0
    assert "## Which batch size" in capsys.readouterr().out


def test_a_paper_gets_its_sentence_and_table(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, run_dir, "--paper") == 0
    assert capsys.readouterr().out.startswith("We train swin")
    assert call(monkeypatch, run_dir, "--latex") == 0
    assert r"\toprule" in capsys.readouterr().out
    assert call(monkeypatch, run_dir, "--latex", "--price", 2) == 0
    assert "Cost at 2 an hour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-o", "report.pdf"], ".html or .md"),
        (["-o", "report.html", "--latex"], ".tex"),
        (["-o", "no/such/folder/report.md"], "cannot be written"),
    ],
)
def test_bad_input_is_one_error(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, run_dir, *arguments) == 2
    assert told in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_a_sweep_that_only_evaluates_is_told_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = Path(__file__).parents[1] / "configs/iqa_demo.yaml"
    run = make_run_of(tmp_path, demo, overrides=["train.function=none"])
    assert call(monkeypatch, run.run_dir) == 2
    assert f"tune-easytrain results {run.place}" in capsys.readouterr().err


def test_the_command_is_there() -> None:
    assert "report" in {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
