from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import epoch, finished, make_run, trial_config
from plotly.utils import PlotlyJSONEncoder

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.app import VIEWS, Desk, build_app
from tune_easytrain.dashboard.page import Page
from tune_easytrain.dashboard.run_list import RunList
from tune_easytrain.errors import BadInputError
from tune_easytrain.events import Created, Failed, Probed, append_events
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


@pytest.mark.parametrize(
    ("view", "query", "asked", "there"),
    [
        ("nonsense", {}, "the view nonsense", "overview, trials, curves"),
        ("trials", {"sort": "-speed"}, "sort=-speed", "trial_id, state, val_accuracy_best"),
        ("trials", {"pick": "trial_00000,nobody"}, "pick=nobody", "trial_00000 to trial_00001"),
        ("curves", {"pick": "nobody"}, "pick=nobody", "trial_00000 to trial_00001"),
        ("curves", {"x": "parsecs"}, "x=parsecs", "epoch, optimizer_steps, num_samples, hours"),
        ("curves", {"metric": "charm"}, "metric=charm", "val_accuracy, gpu_utilization"),
        ("tradeoffs", {"x": "parsecs"}, "x=parsecs", "samples_per_second, peak_memory_bytes"),
        ("parallel", {"x": "hours"}, "", ""),
        ("trials", {"sort": "-epochs", "pick": "trial_00001"}, "", ""),
    ],
)
def test_what_an_address_asks_for_in_vain_is_told_with_what_there_is(
    results: SweepResults, view: str, query: dict[str, str], asked: str, there: str
) -> None:
    desk = Desk(RunList([str(results.run_dir)]))
    page = desk.answer(Address(results.run_dir.name, view, query=query), "")[1]
    assert page is not None
    told = [element.children for element in page.live if getattr(element, "role", "") == "status"]
    told = [text for text in told if isinstance(text, str)]
    if not asked:
        assert told == []
        return
    (text,) = told
    assert text.startswith(f"Not understood in the address: {asked} (")
    assert there in text


def test_an_unknown_view_is_the_overview(results: SweepResults) -> None:
    desk = Desk(RunList([str(results.run_dir)]))
    address = Address(results.run_dir.name, "nonsense")
    assert "1 of 2 trials" in as_text(desk.answer(address, "")[1])
    heading = json.dumps(desk.heading(address), cls=PlotlyJSONEncoder)
    assert heading.count('"aria-current": "page"') == 1


def with_failed(folder: Path, num_good: int, num_failed: int) -> SweepResults:
    """A run in which the trials that failed had reported the best values."""
    good = [finished(epoch(1, 0.5)) for _ in range(num_good)]
    bad = [[*finished(epoch(1, 0.9))[:-1], Failed(error="it broke")] for _ in range(num_failed)]
    return make_run(folder, [*bad, *good])


def test_the_best_curves_are_of_trials_that_did_not_fail(tmp_path: Path) -> None:
    run = with_failed(tmp_path, 12, 3).run_dir
    desk = Desk(RunList([str(run)]))
    text = as_text(desk.answer(Address(run.name, "curves"), "")[1])
    assert "the best 12 trials" in text
    assert "trial_00014" in text
    assert "trial_00002" not in text
    assert "✗ failed" in as_text(
        desk.answer(Address(run.name, "curves", query={"pick": "trial_00002"}), "")[1]
    )


@pytest.mark.parametrize("x", ["samples_per_second", "effective_batch_size"])
def test_no_trial_that_failed_is_on_the_front(tmp_path: Path, x: str) -> None:
    run = with_failed(tmp_path, 2, 1).run_dir
    page = Desk(RunList([str(run)])).answer(Address(run.name, "tradeoffs", query={"x": x}), "")[1]
    assert page is not None
    figure, front = as_text(Page(page.live[:-1])), as_text(Page(page.live[-1:]))
    assert "✗ failed" in figure
    assert "3 trials, 1 of them failed and not on the line" in figure
    assert "trial_00000" in figure
    assert "trial_00000" not in front
    assert "✓ finished" in front


def test_where_all_have_failed_there_is_no_front(tmp_path: Path) -> None:
    run = with_failed(tmp_path, 0, 2).run_dir
    text = as_text(Desk(RunList([str(run)])).answer(Address(run.name, "tradeoffs"), "")[1])
    assert "✗ failed" in text
    assert "Beaten by none" not in text


def test_equal_values_have_one_colour_and_one_number(tmp_path: Path) -> None:
    trials = [finished(epoch(1, 0.51)) for _ in range(8)]
    trials.append(finished(epoch(1, 0.7), config=trial_config("large")))
    run = make_run(tmp_path, trials).run_dir
    page = Desk(RunList([str(run)])).answer(Address(run.name, "parallel"), "")[1]
    assert page is not None
    figure = page.live[0].children[0].figure
    assert [trace["name"] for trace in figure["data"] if trace["mode"] == "lines"] == ["0.51", "0.7"]


def test_a_probe_along_a_knob_shows_the_rule_of_thumb_beside_the_estimate(tmp_path: Path) -> None:
    events = finished(epoch(1, 0.5))
    assert isinstance(events[1], Probed)
    events[1] = replace(events[1], knob="max_crops=4", rule_of_thumb_size=51, estimated_size=60)
    run = make_run(tmp_path, [events, finished(epoch(1, 0.5))]).run_dir
    desk = Desk(RunList([str(run)]))
    page = desk.answer(Address(run.name, "probes"), "")[1]
    assert page is not None
    table = next(part for part in page.live if getattr(part, "role", "") == "region").children
    head, body = table.children
    headings = [cell.children for cell in head.children.children]
    found = dict(zip(headings, [cell.children for cell in body.children[0].children], strict=True))
    assert (found["fits"], found["rule of thumb (samples)"], found["estimate (samples)"]) == ("4", "51", "60")
    trial = as_text(desk.answer(Address(run.name, "trial", "trial_00000"), "")[1])
    assert "51 samples" in trial
    assert "60 samples" in trial


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
