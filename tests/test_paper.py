from __future__ import annotations

from pathlib import Path

import pytest
from made_studies import Trained, make_run_of, make_study

from tune_easytrain.paper import as_latex, latex, sentence, table
from tune_easytrain.report import Report, ReportOptions
from tune_easytrain.study import build_study

pytest.importorskip("scipy")


def report_of(folder: Path, *trials: Trained) -> Report:
    return Report(build_study(make_study(folder, trials, num_epochs=30)), ReportOptions())


def seeds(size: int, metric: float, num_seeds: int = 3) -> list[Trained]:
    return [Trained(size, seed, metric + 0.0004 * seed) for seed in range(num_seeds)]


def test_the_sentence_has_what_reviewers_ask_for(tmp_path: Path) -> None:
    said = sentence(report_of(tmp_path, *seeds(24, 0.9306), *seeds(32, 0.9336), *seeds(48, 0.9328)))
    assert said == (
        "We train swin_b with an effective batch size of 32 on one NVIDIA A100, for 30 epochs, with early "
        "stopping (patience 7) (12.5 h a run). The batch size was selected by ablation over 24, 32 and 48 (3 "
        "seeds each): val_srcc 0.9340 ± 0.0004."
    )


def test_the_sentence_claims_nothing_that_was_not_measured(tmp_path: Path) -> None:
    assert sentence(report_of(tmp_path, *seeds(32, 0.9))).endswith("No other batch size was measured.")
    assert "may be chance" in sentence(report_of(tmp_path, *seeds(32, 0.9, 1), *seeds(48, 0.8, 1)))
    assert "accumulated from 2 micro-batches of 16" in sentence(
        report_of(tmp_path, Trained(32, 0, 0.9, limit=16))
    )
    assert "No trial has finished" in sentence(report_of(tmp_path, Trained(32, 0, 0.9, is_over=False)))


def test_the_table_is_of_the_chosen_model(tmp_path: Path) -> None:
    _, rows = table(
        report_of(tmp_path, *seeds(24, 0.93), *seeds(32, 0.94), Trained(32, 0, 0.5, model="swin_t"))
    )
    assert [row[0] for row in rows] == ["24", "32"]


def test_latex_is_text_letter_by_letter(tmp_path: Path) -> None:
    assert latex(r"a_b & 50 % \x ± {y}") == r"a\_b \& 50 \% \textbackslash{}x $\pm$ \{y\}"
    text = as_latex(report_of(tmp_path, *seeds(24, 0.93), *seeds(32, 0.94)))
    assert text.startswith(r"% The table needs \usepackage{booktabs}.")
    assert r"32 & 3 & 0.9404 $\pm$ 0.0004 & 30 & 12.5 h & 16.0 GiB \\" in text
    assert text.count(r"\begin") == text.count(r"\end") == 2


def test_the_cost_is_in_every_table(tmp_path: Path) -> None:
    study = build_study(make_study(tmp_path, seeds(32, 0.9), num_epochs=30))
    report = Report(study, ReportOptions(price=2.0))
    headings, rows = table(report)
    assert (headings[-1], rows[0][-1]) == ("Cost at 2 an hour", "25.00")
    assert r"& Cost at 2 an hour \\" in as_latex(report)


def test_the_sentence_has_the_model_also_where_it_is_a_constant(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "configs/iqa_demo.yaml"
    quick, full = (
        make_run_of(tmp_path, demo, quick=quick, overrides=["train.patience=null"]) for quick in (True, False)
    )
    assert sentence(Report(build_study(full), ReportOptions())).startswith("We train small_cnn with an ")
    said = sentence(Report(build_study(quick, full), ReportOptions()))
    assert said.startswith("We train small_cnn (share = 0.5, epochs = 2) with an effective batch size of 16 ")


def test_one_epoch_is_one_epoch(tmp_path: Path) -> None:
    study = build_study(make_study(tmp_path, seeds(32, 0.9), num_epochs=1))
    assert "for 1 epoch, with" in sentence(Report(study, ReportOptions()))
