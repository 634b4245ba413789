from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made_runs import epoch, finished, make_run, trial_config
from plotly.utils import PlotlyJSONEncoder

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.app import VIEWS, Desk, build_app
from tune_easytrain.dashboard.page import Page
from tune_easytrain.dashboard.run_list import RunList
from tune_easytrain.errors import BadInputError
from tune_easytrain.events import Created, append_events
from tune_easytrain.results import SweepResults

NAMES = [view.name for view in VIEWS]


@pytest.fixture
def results(tmp_path: Path) -> SweepResults:
    trials = [finished(epoch(1, 0.5), epoch(2, 0.7)), [Created(config=trial_config("large"))]]
    return make_run(tmp_path, trials)


def as_text(page: Page | None) -> str:
    assert page is not None
    return json.dumps([list(page.controls), list(page.live)], cls=PlotlyJSONEncoder, ensure_ascii=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_made_again_only_when_something_has_changed(results: SweepResults, name: str) -> None:
    desk = Desk(RunList([str(results.run_dir)]))
    address = Address(results.run_dir.name, name)
    version, page = desk.answer(address, "")
    assert page is not None
    if name not in ("overview",):  # where times go by
        assert desk.answer(address, version) == (version, None)
    append_events(results.run_dir / "trials" / "trial_00000.jsonl", [epoch(3, 0.9)])
    question = desk.question(address)
    assert question is not None
    question.run.poll(max_age_seconds=0)
    later, page = desk.answer(address, version)
    assert later != version
    assert page is not None


def test_what_a_view_shows_is_in_its_page(results: SweepResults) -> None:
    desk = Desk(RunList([str(results.run_dir)]))
    run = results.run_dir.name
    overview = as_text(desk.answer(Address(run), "")[1])
    assert "1 of 2 trials" in overview
    assert "Best so far: val_accuracy 0.7" in overview
    table = as_text(desk.answer(Address(run, "trials"), "")[1])
    assert "4 × 2 × 1 = 8" in table
    assert "200 B of 999 B" in table


def test_a_condition_that_is_none_is_told_beside_the_box(results: SweepResults) -> None:
    desk = Desk(RunList([str(results.run_dir)]))
    for name in ("trials", "curves", "parallel", "importance", "tradeoffs", "probes"):
        text = as_text(desk.answer(Address(results.run_dir.name, name, query={"where": "epochs >"}), "")[1])
        assert "the value after > is missing" in text
        assert '"box": "where"' in text


def test_a_run_that_is_not_there_is_told_with_those_that_are(results: SweepResults) -> None:
    desk = Desk(RunList([str(results.run_dir)]))
    text = as_text(desk.answer(Address("elsewhere"), "")[1])
    assert "There is no run named elsewhere here." in text
    assert results.run_dir.name in text
    assert "There is no trial trial_00009" in as_text(
        desk.answer(Address(results.run_dir.name, "trial", "trial_00009"), "")[1]
    )


def test_a_run_that_vanishes_stays_as_it_was_and_says_so(results: SweepResults) -> None:
    desk = Desk(RunList([str(results.run_dir)]))
    address = Address(results.run_dir.name, "trials")
    version, _ = desk.answer(address, "")
    question = desk.question(address)
    assert question is not None
    shutil.rmtree(results.run_dir)
    question.run.poll(max_age_seconds=0)
    text = as_text(desk.answer(address, version)[1])
    assert "What you see may be old" in text
    assert "trial_00000" in text


def test_a_damaged_run_is_told(results: SweepResults) -> None:
    (results.run_dir / "sweep.json").write_text("{")
    desk = Desk(RunList([str(results.run_dir)]))
    assert "sweep.json" in as_text(desk.answer(Address(results.run_dir.name), "")[1])


def test_a_place_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="nowhere"):
        build_app([str(tmp_path / "nowhere")])
