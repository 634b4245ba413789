"""The dashboard's pages in a real Chromium: what they show, how they are used, and what they withstand."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pandas as pd
import pytest
from made_runs import epoch, finished, make_run, trial_config

import tune_easytrain as te
from tune_easytrain.config import load_config
from tune_easytrain.events import (
    Created,
    Event,
    Failed,
    Finished,
    Interrupted,
    Planned,
    Probed,
    Reported,
    Rescued,
    Started,
    Stopped,
    append_events,
)
from tune_easytrain.results import SweepResults
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.search_space import known_configs

pytest.importorskip("dash")
pytest.importorskip("playwright")

from chromium import Tab, opened
from playwright.sync_api import Browser, BrowserContext, expect
from served_dashboard import Served, served

MODELS = ["tiny", "small", "medium", "large", "huge"]
GRID = {
    "model.type": MODELS,
    "hp.batch_size": [64, 32, 16, 8, 4],
    "hp.learning_rate": [round(1e-4 * 1.6**number, 7) for number in range(11)],
    "batch.effective_batch_size": [32, 64],
}
SWEEP = {
    "grid_search": {"grid": GRID},
    "batch": {},
    "config": {"data": {"root": "/data"}},
    "train": {"epochs": 5},
}
GIB = 2**30
VIEWS = ["overview", "trials", "curves", "parallel", "importance", "tradeoffs", "probes", "compare"]
TRACEBACK = 'Traceback (most recent call last):\n  File "task.py", line 3\nValueError: the loss is nan'

HOSTILE = '<img src=x onerror="window.owned=1">'
HOSTILE_LINK = "<a href='https://evil.example/'>go</a>"


# The runs.


def config_of(number: int) -> dict[str, Any]:
    return list(itertools.islice(known_configs(load_config(SWEEP), 110), 110))[number]


def trials_of_a_sweep() -> list[list[Event]]:
    """110 trials in every state that there is."""
    configs = list(known_configs(load_config(SWEEP), 110))
    assert len(configs) == 110
    return [events_of(number, config) for number, config in enumerate(configs)]


def events_of(number: int, config: dict[str, Any]) -> list[Event]:
    start = 1.79e9 + 40 * number
    place = MODELS.index(config["model"]["type"])
    effective, limit = config["batch"]["effective_batch_size"], config["hp"]["batch_size"]
    size = min(effective, limit)
    peak = (2 * place + 3) * GIB
    created = Created(config=config, time=start - 100)
    if number >= 106:
        return [created]
    begun: list[Event] = [created, Started(config=config, time=start)]
    if number == 105:
        return begun
    tries = [
        {
            "microbatch_size": 2 * size,
            "outcome": "out_of_memory",
            "peak_bytes": 0,
            "message": "CUDA out of memory",
        },
        {"microbatch_size": size, "outcome": "fits", "peak_bytes": peak, "message": ""},
    ]
    probe = Probed(
        time=start + 1, microbatch_size=size, budget_bytes=16 * GIB, bounded_by="memory", seconds=2.5,
        attempts=tries if number < 5 else tries[1:], limit=effective, signature=f"s{place}",
        cached=number >= 5, estimated_peak_bytes=peak - 2**20,
    )  # fmt: skip
    plan = Planned(
        time=start + 2, device="NVIDIA H100", budget_bytes=16 * GIB, effective_batch_size=effective,
        microbatch_size=size, accumulation_steps=effective // size, num_workers=1,
    )  # fmt: skip
    if number == 3:
        return [*begun, probe, Failed(time=start + 9, error="ValueError: the loss is nan", details=TRACEBACK)]
    num_epochs = {17: 1, 40: 2, 41: 2}.get(number, 5 if number < 100 else 3)
    reports = [report(number, config, epoch, start + 2 + 5 * epoch) for epoch in range(1, num_epochs + 1)]
    events = [*begun, probe, plan, *reports]
    if number == 50:
        events.append(
            Rescued(
                time=start + 30, failed_microbatch_size=size, microbatch_limit=size // 2,
                microbatch_size=size // 2, accumulation_steps=2 * effective // size,
            )
        )  # fmt: skip
    ends: dict[int, Event] = {
        17: Failed(time=start + 9, error="RuntimeError: a worker was lost"),
        40: Stopped(time=start + 15, reason="ASHA stopped it"),
        41: Interrupted(time=start + 15, reason="its node was lost"),
    }
    if number < 100:
        events.append(ends.get(number, Finished(time=start + 30, reason="all 5 epochs done")))
    return events


def report(number: int, config: dict[str, Any], epoch: int, when: float) -> Reported:
    place = MODELS.index(config["model"]["type"])
    rate = config["hp"]["learning_rate"]
    accuracy = 0.9 - 0.1 * abs(math.log10(rate) + 3) - 0.3 / (epoch + 1) + 0.01 * place + 1e-5 * number
    metrics = {
        "epoch": epoch, "optimizer_steps": 20 * epoch, "num_samples": 640 * epoch, "learning_rate": rate,
        "samples_per_second": 900 / (place + 1) + number / 7, "data_wait_share": 0.05, "epoch_seconds": 5.0,
        "train_loss": 2 / epoch + 1e-4 * number, "val_accuracy": accuracy,
    }  # fmt: skip
    return Reported(time=when, metrics=metrics, peak_memory_bytes=(2 * place + 3) * GIB + number * 2**20)


def other_trials() -> list[list[Event]]:
    """The first 30 trials of the other sweep, somewhat better."""
    return [[_better(event) for event in events] for events in trials_of_a_sweep()[:30]]


def _better(event: Event) -> Event:
    if not isinstance(event, Reported):
        return event
    metrics = event.metrics | {"val_accuracy": event.metrics["val_accuracy"] + 0.03}
    return replace(event, metrics=metrics, peak_memory_bytes=event.peak_memory_bytes // 2)


def hostile_trials() -> list[list[Event]]:
    """Trials whose every text wants to be HTML."""
    names = [HOSTILE, HOSTILE_LINK, "<b>bold</b>", "{{7*7}} %{x} &lt;b&gt;"]
    found = []
    for number, name in enumerate(names):
        config = {"model": {"type": name}, "hp": {"batch_size": 4}, "batch": {"effective_batch_size": 8}}
        more = {HOSTILE: 0.5 + number, HOSTILE_LINK: 1.0}
        plain = [epoch(at, 0.1 * (number + at)) for at in (1, 2)]
        reports = [replace(report, metrics=report.metrics | more) for report in plain]
        started, _, *rest = finished(*reports, config=config)
        probe = Probed(
            microbatch_size=4, budget_bytes=999, bounded_by=HOSTILE, seconds=1.5, no_estimate=HOSTILE,
            attempts=[{"microbatch_size": 4, "outcome": HOSTILE_LINK, "message": HOSTILE}],
        )  # fmt: skip
        if number == 3:
            rest[-1] = Failed(error=f"{HOSTILE} {HOSTILE_LINK}", details=HOSTILE)
        found.append([started, probe, *rest])
    return found


def make_named(folder: Path, name: str, trials: list[list[Event]], **sweep: Any) -> SweepResults:
    """Make a run whose directory has a name of our own."""
    made = make_run(folder / "making", trials, **sweep).run_dir
    return te.load_results(made.rename(folder / name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with the runs that all tests look at."""
    folder = tmp_path_factory.mktemp("runs")
    swept = make_named(folder, "swept", trials_of_a_sweep(), **SWEEP)
    place, _ = RunDirectory.open(swept.run_dir).ray_place
    checkpoint = Path(place) / "trial_00002" / "checkpoint_000004" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(bytes(3 * 2**20))
    make_named(folder, "other", other_trials(), **SWEEP)
    make_named(folder, "hostile", hostile_trials(), run={"metric": HOSTILE, "mode": "max"})
    hostile_file = folder / "hostile" / "trials" / f"{HOSTILE}.jsonl"
    shutil.copyfile(folder / "hostile" / "trials" / "trial_00000.jsonl", hostile_file)
    shutil.copytree(folder / "hostile", folder / HOSTILE)
    (make_named(folder, "damaged", [finished(epoch(1, 0.5))]).run_dir / "sweep.json").write_text('{"name": ')
    make_named(folder, "empty", [])
    (folder / "making").rmdir()
    return folder


@pytest.fixture(scope="module")
def swept(runs: Path) -> SweepResults:
    return te.load_results(runs / "swept")


@pytest.fixture(scope="module")
def frame(swept: SweepResults) -> pd.DataFrame:
    return swept.frame()


# The browser.


@pytest.fixture(scope="module")
def dashboard(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(runs, log=tmp_path_factory.mktemp("dashboard") / "log") as server:
        yield server
        assert server.log.read_text() == ""


@pytest.fixture(scope="module")
def context(chromium: Browser) -> Iterator[BrowserContext]:
    """What the browser keeps from tab to tab: a page's scripts, for one."""
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    yield context
    context.close()


@pytest.fixture
def tab(context: BrowserContext, dashboard: Served) -> Iterator[Tab]:
    with opened(context, dashboard.url) as tab:
        yield tab


def close(a: str, b: float) -> bool:
    """Whether a number on a page is that value, to the four digits that are shown."""
    return float(a) == pytest.approx(b, rel=1e-3)


# What the views show.


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_shown_under_its_name(tab: Tab, view: str) -> None:
    tab.open(f"/run/swept/{view}")
    expect(tab.page.get_by_role("heading", level=1)).to_have_text("swept")
    chosen = tab.page.locator("nav.views [aria-current=page]")
    expect(chosen).to_have_count(1)
    expect(chosen.get_by_role("link")).to_have_attribute("href", f"/run/swept/{view}")
    expect(tab.page.get_by_role("alert")).to_have_count(0)
    expect(tab.page).to_have_title(f"{view} · swept · tune_easytrain")
    expect(tab.live.locator("figure, table, .note").first).to_be_visible()


def test_the_list_of_sweeps_leads_to_each(tab: Tab, runs: Path) -> None:
    tab.open()
    listed = {row["sweep"]: row["run directory"] for row in tab.table("Sweeps")}
    assert listed == {path.name: str(path) for path in runs.iterdir()}
    tab.page.get_by_role("link", name="other", exact=True).click()
    expect(tab.page.get_by_role("heading", level=1)).to_have_text("other")
    tab.page.get_by_role("link", name="All sweeps").click()
    expect(tab.region("Sweeps")).to_be_visible()


def test_a_run_that_is_not_there_is_told(tab: Tab) -> None:
    tab.open("/run/nowhere/trials")
    expect(tab.page.get_by_role("alert")).to_have_text("There is no run named nowhere here.")
    tab.open("/run/swept/trial/nobody")
    expect(tab.live).to_contain_text("There is no trial nobody in this sweep.")


def test_a_run_without_trials_has_every_view(tab: Tab) -> None:
    for view in VIEWS:
        tab.open(f"/run/empty/{view}")
        expect(tab.page.get_by_role("alert")).to_have_count(0)


def test_the_overview_counts_and_ranks_as_the_frame_does(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open("/run/swept")
    states = [line.split() for line in tab.live.locator("ul.states > li").all_inner_texts()]
    assert {name: int(number) for _, name, number in states} == dict(Counter(frame["state"]))
    ended = frame["state"].isin(["finished", "failed", "stopped"]).sum()
    assert tab.fact("Ended") == f"{ended} of {len(frame)} trials"
    best = frame.nlargest(5, "val_accuracy_best")
    shown = tab.table("The best trials by val_accuracy")
    assert [row["trial"] for row in shown] == list(best["trial_id"])
    assert all(map(close, [row["val_accuracy"] for row in shown], best["val_accuracy_best"]))
    assert [row["best epoch"] for row in shown] == [str(number) for number in best["best_epoch"]]
    running = frame[frame["state"].isin(["probing", "training"])]
    shown = tab.table("Running trials")
    assert [row["trial"] for row in shown] == list(running["trial_id"])
    assert [row["epochs"] for row in shown] == [f"{0 if pd.isna(n) else n} of 5" for n in running["epochs"]]
    failed = frame[frame["state"] == "failed"]
    assert [(row["trial"], row["error"]) for row in tab.table("Failed trials")] == list(
        zip(failed["trial_id"], failed["error"], strict=True)
    )


def test_the_table_shows_every_trial_as_the_frame_has_it(tab: Tab, frame: pd.DataFrame) -> None:
    rows: list[dict[str, str]] = []
    for page in (1, 2, 3):
        tab.open(f"/run/swept/trials?page={page}")
        rows += tab.table("Trials")
    assert [row["trial"] for row in rows] == list(frame["trial_id"])
    for row, (_, trial) in zip(rows, frame.iterrows(), strict=True):
        sign, word, *error = row["state"].split(maxsplit=2)
        assert (word, " ".join(error)) == (trial["state"], trial["error"])
        assert len(sign) == 1  # nobody has to see its colour
        assert row["model.type"] == trial["model.type"]
        assert close(row["hp.learning_rate"], trial["hp.learning_rate"])
        if pd.isna(trial["microbatch_size"]):
            continue
        numbers = [trial["microbatch_size"], trial["accumulation_steps"], 1, trial["effective_batch_size"]]
        batch = row["micro-batch × steps × workers = effective"]
        assert [int(number) for number in re.findall(r"\d+", batch)] == numbers
        assert row["epochs"] == str(trial["epochs"])
        assert close(row["samples/s"], trial["samples_per_second"])
        assert close(row["val_accuracy (best)"], trial["val_accuracy_best"])
        peak = float(row["peak memory of budget"].split()[0])
        assert peak == pytest.approx(trial["peak_memory_bytes"] / GIB, abs=0.06)
        assert row["rescues"] == str(trial["num_rescues"])


@pytest.mark.parametrize(
    ("heading", "column", "is_first_falling"),
    [
        ("val_accuracy (best)", "val_accuracy_best", True),
        ("peak memory of budget", "peak_memory_bytes", False),
        ("model.type", "model.type", False),
    ],
)
def test_a_heading_sorts_by_its_column_the_better_end_first(
    tab: Tab, frame: pd.DataFrame, heading: str, column: str, is_first_falling: bool
) -> None:
    tab.open("/run/swept/trials")
    for is_falling in (is_first_falling, not is_first_falling):
        tab.region("Trials").get_by_role("link", name=heading).click()
        direction = "descending" if is_falling else "ascending"
        expect(tab.region("Trials").locator(f"th[aria-sort={direction}]")).to_contain_text(heading)
        by_value = frame.sort_values(column, ascending=not is_falling, kind="stable", na_position="last")
        assert [row["trial"] for row in tab.table("Trials")] == list(by_value["trial_id"])[:50]


def test_a_search_and_a_condition_narrow_the_table(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open("/run/swept/trials?page=3")
    tab.box("Search").press_sequentially("huge FINISHED")
    found = frame[(frame["model.type"] == "huge") & (frame["state"] == "finished")]
    expect(tab.live).to_contain_text(f"{len(found)} of {len(frame)} trials")
    assert [row["trial"] for row in tab.table("Trials")] == list(found["trial_id"])
    tab.box("Only trials with").press_sequentially("val_accuracy_best > 0.8 and epochs == 5")
    found = found[(found["val_accuracy_best"] > 0.8) & (found["epochs"] == 5)]
    assert 0 < len(found) < 20
    expect(tab.live).to_contain_text(f"{len(found)} of {len(frame)} trials")
    assert [row["trial"] for row in tab.table("Trials")] == list(found["trial_id"])
    query = parse_qs(urlsplit(tab.page.url).query)
    assert query == {"search": ["huge FINISHED"], "where": ["val_accuracy_best > 0.8 and epochs == 5"]}
    tab.box("Search").fill("nothing like this")
    expect(tab.live).to_contain_text("No trial is like that.")


def test_a_bad_condition_is_told_and_can_be_mended(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open("/run/swept/trials")
    box = tab.box("Only trials with")
    box.fill("modell.type == tiny")
    expect(tab.page.get_by_role("alert")).to_contain_text("modell.type")
    expect(tab.page.get_by_role("alert")).to_contain_text("model.type")
    box.fill("epochs >")
    expect(tab.page.get_by_role("alert")).to_contain_text("epochs >")
    box.fill("model.type == tiny")
    expect(tab.live).to_contain_text(f"{(frame['model.type'] == 'tiny').sum()} of {len(frame)} trials")


def test_the_filter_stays_from_view_to_view(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open(f"/run/swept/trials?{urlencode({'where': 'model.type == tiny'})}")
    tab.page.locator("nav.views").get_by_role("link", name="Trade-offs").click()
    tab.wait_for_address("/tradeoffs")
    expect(tab.live.locator("figcaption")).to_contain_text("trials")
    expect(tab.box("Only trials with")).to_have_value("model.type == tiny")
    chosen = frame[(frame["model.type"] == "tiny") & frame["val_accuracy_best"].notna()]
    assert sum(len(trace["x"]) for trace in tab.traces() if trace["mode"] == "markers") == len(chosen)


def test_pages_of_the_table_are_reached_by_their_links(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open("/run/swept/trials")
    pages = tab.page.get_by_role("navigation", name="Pages")
    for name, number in (("next", 2), ("last", 3), ("previous", 2), ("first", 1)):
        pages.get_by_role("link", name=name, exact=True).click()
        expect(pages).to_contain_text(f"Page {number} of 3")
        expected = list(frame["trial_id"])[50 * (number - 1) : 50 * number]
        assert [row["trial"] for row in tab.table("Trials")] == expected


def test_picked_trials_become_curves_of_what_they_reported(tab: Tab, swept: SweepResults) -> None:
    tab.open("/run/swept/trials")
    picked = ["trial_00002", "trial_00007", "trial_00040"]
    for number, name in enumerate(picked, start=1):
        tab.page.get_by_title(f"pick {name}", exact=True).click()
        expect(tab.live).to_contain_text(f"curves of the {number} picked")
    tab.page.get_by_role("link", name="curves of the 3 picked").click()
    expect(tab.live.locator("figcaption")).to_contain_text("the 3 picked trials")
    history = swept.history()
    assert_curves_are(tab, history, picked, "epoch", "val_accuracy")
    tab.page.get_by_role("navigation", name="Metric").get_by_role("link", name="train_loss").click()
    expect(tab.live.locator("figcaption")).to_contain_text("train_loss")
    tab.page.get_by_role("navigation", name="Over").get_by_role("link", name="samples").click()
    tab.wait_for_address("x=num_samples")
    expect(tab.live.locator(".xtitle")).to_have_text("samples")
    assert_curves_are(tab, history, picked, "num_samples", "train_loss")
    tab.page.get_by_role("link", name="leave out").nth(1).click()
    expect(tab.live.locator("figcaption")).to_contain_text("the 2 picked trials")
    assert_curves_are(tab, history, [picked[0], picked[2]], "num_samples", "train_loss")


def assert_curves_are(tab: Tab, history: pd.DataFrame, trials: list[str], x: str, y: str) -> None:
    traces = tab.traces()
    assert [trace["name"].split()[0] for trace in traces] == trials
    for trace, name in zip(traces, trials, strict=True):
        rows = history[history["trial_id"] == name]
        assert trace["x"] == list(rows[x])
        assert trace["y"] == pytest.approx(list(rows[y]))
    expect(tab.live.locator(".scatterlayer .trace .js-line")).to_have_count(len(trials))


def test_without_picks_the_best_trials_have_curves(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open("/run/swept/curves")
    best = frame.nlargest(12, "val_accuracy_best")["trial_id"]
    assert [trace["name"].split()[0] for trace in tab.traces()] == list(best)


def drag_along_axis(tab: Tab, place: float, low: float, high: float) -> None:
    """Drag along an axis of the parallel coordinates, between two shares of its height."""
    across, up = tab.live.locator("#parallel .js-plotly-plot").evaluate(
        """(graph, [place, low, high]) => {
            const {xaxis, yaxis} = graph._fullLayout, box = graph.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.c2p(place),
                    [low, high].map(share => box.top + yaxis._offset + yaxis.c2p(share))];
        }""",
        [place, low, high],
    )
    tab.page.mouse.move(across - 15, up[0])
    tab.page.mouse.down()
    tab.page.mouse.move(across, (up[0] + up[1]) / 2, steps=5)
    tab.page.mouse.move(across + 15, up[1], steps=5)
    tab.page.mouse.up()


def test_parallel_coordinates_keep_the_trials_that_are_dragged_over(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open("/run/swept/parallel")
    traces = [trace for trace in tab.traces() if trace["mode"] == "lines"]
    drawn = {name for trace in traces for name in trace["text"] if name}
    assert drawn == set(frame["trial_id"])
    axes = tab.live.locator(".xaxislayer-above .xtick").all_text_contents()
    assert axes[0] == "model.type"
    assert axes[-1] == "val_accuracy"
    drag_along_axis(tab, len(axes) - 1, 0.75, 1.03)
    tab.wait_for_address("brush=")
    expect(tab.live.get_by_role("heading", name="Kept")).to_be_visible()
    values = frame["val_accuracy_best"].dropna()
    brush = json.loads(parse_qs(urlsplit(tab.page.url).query)["brush"][0])
    low, high = brush["val_accuracy_best"]
    assert low == pytest.approx(values.min() + 0.75 * (values.max() - values.min()), rel=0.01)
    assert high >= values.max()
    kept = frame[frame["val_accuracy_best"].between(low, high)]
    expect(tab.live.locator("figcaption")).to_contain_text(f"{len(kept)} of {len(frame)} trials")
    best = kept.nlargest(15, "val_accuracy_best")
    assert [row["trial"] for row in tab.table("Trials kept")] == list(best["trial_id"])
    shown = tab.table("Trials kept")
    assert all(map(close, [row["peak memory (GiB)"] for row in shown], best["peak_memory_bytes"] / GIB))
    drag_along_axis(tab, 0, -0.05, 0.05)  # the first model on the axis of words
    both = kept[kept["model.type"] == "tiny"]
    assert 0 < len(both) < len(kept)
    expect(tab.live.locator("figcaption")).to_contain_text(f"{len(both)} of {len(frame)} trials")
    tab.page.get_by_role("link", name="All trials again").click()
    expect(tab.live.get_by_role("heading", name="Kept")).to_have_count(0)
    assert "brush" not in tab.address


@pytest.mark.parametrize(
    ("x", "is_better_high"), [("samples_per_second", True), ("peak_memory_bytes", False)]
)
def test_the_front_holds_the_trials_that_none_beats(
    tab: Tab, frame: pd.DataFrame, x: str, is_better_high: bool
) -> None:
    tab.open(f"/run/swept/tradeoffs?x={x}")
    reported = frame.dropna(subset=["val_accuracy_best"])
    rows = reported[reported["state"] != "failed"]
    points = [
        (row[x] * (1 if is_better_high else -1), row["val_accuracy_best"]) for _, row in rows.iterrows()
    ]
    front = {
        name
        for name, (a, b) in zip(rows["trial_id"], points, strict=True)
        if not any((c >= a and d >= b) and (c > a or d > b) for c, d in points)
    }
    assert {row["trial"] for row in tab.table("Beaten by none")} == front
    traces = {trace["name"]: trace for trace in tab.traces()}
    assert len(traces.pop("Pareto front")["x"]) == len(front)
    assert set(traces) == {*MODELS, "✗ failed"}
    assert len(traces["✗ failed"]["x"]) == len(reported) - len(rows) == 1
    assert sum(len(trace["x"]) for trace in traces.values()) == len(reported)
    expect(tab.live.locator(".scatterlayer .point")).to_have_count(len(reported))


def test_each_effective_batch_size_has_its_best_trial(tab: Tab, frame: pd.DataFrame) -> None:
    tab.open("/run/swept/tradeoffs?x=effective_batch_size")
    best = frame.loc[frame.groupby("effective_batch_size")["val_accuracy_best"].idxmax()]
    shown = tab.table("Best of each effective batch size")
    assert [(row["trial"], row["effective batch size"]) for row in shown] == [
        (row["trial_id"], str(row["effective_batch_size"])) for _, row in best.iterrows()
    ]


def test_probes_show_every_try_and_the_estimate(tab: Tab, swept: SweepResults) -> None:
    tab.open("/run/swept/probes")
    own = [record for record in swept.records() if record.probe and not record.probe.cached]
    shown = tab.table("Probes")
    assert [row["trial"] for row in shown] == [record.trial_id for record in own]
    for row, record in zip(shown, own, strict=True):
        size = record.probe.microbatch_size
        assert row["tries"].splitlines() == [f"{2 * size} ✗ out of memory", f"{size} ✓ fits"]
        assert row["fits"] == str(size)
        assert row["bounded by"] == "memory: the next size failed"
        peak = record.probe.attempts[1]["peak_bytes"]
        assert row["measured of budget"].startswith(f"{peak / GIB:.1f} GiB of 16")
        ratio = re.search(r"\((.*) × measured\)", row["estimate"])
        assert ratio is not None
        assert float(ratio[1]) == pytest.approx((peak - 2**20) / peak, abs=1e-3)
    reused = Counter(r.probe.signature for r in swept.records() if r.probe and r.probe.cached)
    assert [int(row["used again by"]) for row in shown] == [reused[record.probe.signature] for record in own]
    assert {trace["name"]: len(trace["y"]) for trace in tab.traces()} == dict.fromkeys(
        ["budget", "measured", "estimated"], len(own)
    )


def test_importance_names_the_key_that_matters(tab: Tab) -> None:
    tab.open("/run/swept/importance")
    expect(tab.region("Importance")).to_be_visible()
    rows = tab.table("Importance")
    assert rows[0]["key"] == "hp.learning_rate"
    shares = [float(row["importance"].rstrip("%")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert shares[0] > 60


def test_a_trial_has_its_config_log_and_checkpoints(tab: Tab, swept: SweepResults) -> None:
    tab.open("/run/swept/trials")
    tab.region("Trials").get_by_role("link", name="trial_00002", exact=True).click()
    tab.wait_for_address("/trial/trial_00002")
    expect(tab.live.get_by_role("heading", name="trial_00002")).to_contain_text("finished")
    config = {row["key"]: row["value"] for row in tab.table("Config")}
    record = next(record for record in swept.records() if record.trial_id == "trial_00002")
    assert config["model.type"] == record.config["model"]["type"]
    assert config["data.root"] == "/data"
    assert config["batch.effective_batch_size"] == str(record.config["batch"]["effective_batch_size"])
    log = [row["what happened"] for row in tab.table("Log")]
    assert log[1] == "started"
    assert "out_of_memory" in log[2]
    assert [line.split(":")[0] for line in log if line.startswith("epoch")] == [
        f"epoch {n}" for n in range(1, 6)
    ]
    assert "all 5 epochs done" in log[-1]
    (stored,) = tab.table("Checkpoints")
    assert stored["file"].endswith("trial_00002/checkpoint_000004/checkpoint.pt")
    assert stored["size"] == "3.0 MiB"
    accuracy, loss = tab.traces()
    assert accuracy["y"] == pytest.approx([report["val_accuracy"] for report in record.reports])
    assert loss["y"] == pytest.approx([report["train_loss"] for report in record.reports])
    tab.page.get_by_role("link", name="next trial").click()
    expect(tab.live.get_by_role("heading", name="trial_00003")).to_contain_text("failed")
    expect(tab.live.locator(".problem")).to_have_text("ValueError: the loss is nan")
    expect(tab.live.locator("details pre")).to_have_text(TRACEBACK)


def test_two_sweeps_are_compared_trial_by_trial(tab: Tab, runs: Path) -> None:
    tab.open("/run/swept/compare")
    expect(tab.live).to_contain_text("Choose the sweep to compare this one with.")
    tab.page.get_by_role("navigation", name="With").get_by_role("link", name="other").click()
    expect(tab.live).to_contain_text("Trials: 30 in both, 80 in a alone, 0 in b alone.")
    box = tab.box("Only rows with")
    box.fill("found_in == both")
    expect(tab.live).to_contain_text("Trials: 30 in both, 0 in a alone, 0 in b alone.")
    compared = te.compare(runs / "swept", runs / "other")
    compared = compared[compared["found_in"] == "both"]
    rows = tab.table("Both sweeps")
    assert [(row["trial a"], row["trial b"]) for row in rows] == list(
        zip(compared["trial_id_a"], compared["trial_id_b"], strict=True)
    )
    for row, (_, trial) in zip(rows, compared.iterrows(), strict=True):
        if pd.isna(trial["val_accuracy_difference"]):
            assert row["difference"] == ""
            continue
        assert close(row["val_accuracy a"], trial["val_accuracy_a"])
        assert close(row["difference"], trial["val_accuracy_difference"])
        assert close(row["peak memory b / a"], trial["peak_memory_bytes_ratio"])
    trials, equal = tab.traces()
    assert len(trials["x"]) == compared["val_accuracy_difference"].notna().sum()
    assert equal["x"] == equal["y"]
    tab.region("Both sweeps").get_by_role("link").nth(1).click()
    tab.wait_for_address("/run/other/trial/")


# The address.


def sorted_and_picked(tab: Tab) -> None:
    tab.open("/run/swept/trials")
    tab.region("Trials").get_by_role("link", name="samples/s").click()
    tab.wait_for_address("sort=")
    tab.box("Only trials with").fill("epochs == 5")
    tab.wait_for_address("where=")
    tab.box("Search").fill("medium")
    tab.wait_for_address("search=")
    tab.page.get_by_title("pick trial_00002", exact=True).click()
    tab.wait_for_address("pick=")


def curves_of_a_metric(tab: Tab) -> None:
    tab.open("/run/swept/curves?pick=trial_00001,trial_00009")
    tab.page.get_by_role("navigation", name="Metric").get_by_role("link", name="train_loss").click()
    tab.wait_for_address("metric=train_loss")
    tab.page.get_by_role("navigation", name="Over").get_by_role("link", name="optimizer steps").click()
    tab.wait_for_address("x=")


def brushed_coordinates(tab: Tab) -> None:
    tab.open("/run/swept/parallel")
    tab.traces()
    drag_along_axis(tab, 0, 0.3, 1.05)
    tab.wait_for_address("brush=")


@pytest.mark.parametrize("use", [sorted_and_picked, curves_of_a_metric, brushed_coordinates])
def test_the_address_alone_makes_the_same_page(
    tab: Tab, chromium: Browser, use: Callable[[Tab], None]
) -> None:
    use(tab)
    time.sleep(1.5)  # what is to come has come
    there = chromium.new_context(viewport={"width": 1400, "height": 900})
    with opened(there, tab.url) as other:
        other.open(tab.address)
        expect(other.live).to_have_text(tab.live.inner_text(), use_inner_text=True)
        assert other.address == tab.address
        for mine, its in zip(tab.page.locator("input").all(), other.page.locator("input").all(), strict=True):
            assert mine.input_value() == its.input_value()
        if tab.live.locator(".js-plotly-plot").count():
            assert other.traces() == tab.traces()
    there.close()


def test_back_and_forward_go_where_the_reader_was(tab: Tab) -> None:
    tab.open("/run/swept")
    tab.page.locator("nav.views").get_by_role("link", name="Trials").click()
    expect(tab.region("Trials")).to_be_visible()
    tab.box("Only trials with").fill("model.type == huge")
    expect(tab.live).to_contain_text("22 of 110 trials")
    tab.region("Trials").get_by_role("link", name="epochs").click()
    expect(tab.region("Trials").locator("th[aria-sort=ascending], th[aria-sort=descending]")).to_have_count(1)
    tab.page.go_back()
    expect(tab.region("Trials").locator("th[aria-sort=ascending], th[aria-sort=descending]")).to_have_count(0)
    expect(tab.live).to_contain_text("22 of 110 trials")
    tab.page.go_back()
    expect(tab.live).to_contain_text("110 of 110 trials")
    expect(tab.box("Only trials with")).to_have_value("")
    tab.page.go_back()
    expect(tab.live.get_by_role("heading", name="Where it stands")).to_be_visible()
    tab.page.go_forward()
    expect(tab.live).to_contain_text("110 of 110 trials")
    tab.page.go_forward()
    expect(tab.live).to_contain_text("22 of 110 trials")
    expect(tab.box("Only trials with")).to_have_value("model.type == huge")


# Texts from trials.


_LINKS_ELSEWHERE = """() => [...document.querySelectorAll("a")]
    .map(link => new URL(link.getAttribute("href") || link.getAttribute("xlink:href"), location))
    .filter(url => url.origin !== location.origin).map(String)"""


@pytest.mark.parametrize(
    "view",
    [
        *VIEWS,
        "compare?with=swept",
        "trial/trial_00003",
        f"trial/{quote(HOSTILE)}",
        "trials?" + urlencode({"where": HOSTILE}),
        "parallel?" + urlencode({"brush": json.dumps({HOSTILE: [1]})}),
    ],
)
def test_what_trials_and_addresses_say_is_text_and_nothing_else(tab: Tab, view: str) -> None:
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.open(f"/run/{quote(HOSTILE)}/{view}")
    if tab.live.locator(".js-plotly-plot").count():
        tab.traces()
        for point in tab.live.locator(".point, .legendtoggle").all()[:4]:
            point.hover(force=True)
    assert tab.page.evaluate("window.owned") is None
    assert tab.page.locator("img[src=x], #content b").count() == 0
    assert tab.page.evaluate(_LINKS_ELSEWHERE) == []
    assert all(url.startswith(tab.url) for url in asked if not url.startswith("data:"))
    assert not [url for url in asked if url.endswith("/x")]
    expect(tab.page.get_by_role("heading", level=1)).to_have_text(HOSTILE)


def test_texts_from_trials_are_shown_letter_by_letter(tab: Tab) -> None:
    tab.open("/run/hostile/trials")
    rows = tab.table("Trials")
    assert {row["model.type"] for row in rows} == {
        HOSTILE, HOSTILE_LINK, "<b>bold</b>", "{{7*7}} %{x} &lt;b&gt;",
    }  # fmt: skip
    assert any(f"{HOSTILE} {HOSTILE_LINK}" in row["state"] for row in rows)
    assert f"{HOSTILE} (best)" in rows[0]
    tab.open("/run/hostile/tradeoffs")
    legend = tab.live.locator(".legendtext")
    expect(legend.first).to_be_visible()
    assert {"<b>bold</b>", HOSTILE_LINK} <= {text.replace("\xa0", " ") for text in legend.all_text_contents()}
    expect(tab.live.locator(".ytitle")).to_have_text(HOSTILE)


# Keys, eyes, small screens.


def tab_to(tab: Tab, name: str, role: str = "a") -> None:
    """Press Tab until an element of that name has the focus; each on the way must be seen to have it."""
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        found = tab.page.evaluate(
            """() => {
                const element = document.activeElement, style = getComputedStyle(element);
                const box = element.getBoundingClientRect();
                return {
                    kind: element.tagName.toLowerCase(),
                    text: (element.labels && element.labels[0] || element).innerText.trim(),
                    isSeen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1
                        && box.width > 0 && box.right > 0 && box.bottom > 0,
                };
            }"""
        )
        assert found["kind"] == "body" or found["isSeen"], found
        if found["kind"] == role and found["text"].startswith(name):
            return
    raise AssertionError(f"Tab never leads to {name}")


def test_the_keyboard_alone_sorts_filters_and_opens_a_trial(tab: Tab, frame: pd.DataFrame) -> None:
    press = tab.page.keyboard.press
    tab.open("/run/swept")
    tab_to(tab, "Skip to the content")
    tab_to(tab, "Trials")
    press("Enter")
    expect(tab.region("Trials")).to_be_visible()
    tab_to(tab, "Only trials with", "input")
    tab.page.keyboard.type("model.type == large")
    expect(tab.live).to_contain_text("22 of 110 trials")
    tab_to(tab, "val_accuracy (best)")
    press("Enter")
    expect(tab.region("Trials").locator("th[aria-sort=descending]")).to_have_count(1)
    best = frame[frame["model.type"] == "large"].nlargest(1, "val_accuracy_best")["trial_id"].item()
    assert tab.page.evaluate("document.activeElement.innerText").startswith("val_accuracy (best)")
    tab_to(tab, best)
    press("Enter")
    expect(tab.live.get_by_role("heading", name=best)).to_be_visible()


def test_the_way_past_the_menu_leads_to_the_content(tab: Tab) -> None:
    tab.open("/run/swept/trials")
    tab_to(tab, "Skip to the content")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("main")).to_be_focused()
    expect(tab.region("Trials")).to_be_visible()
    assert tab.address.startswith("/run/swept/trials")


@pytest.fixture
def growing(runs: Path, tmp_path: Path) -> Iterator[Path]:
    """The event file of a trial that trains; the run is gone after the test."""
    trials = [finished(epoch(1, 0.3)), finished(epoch(1, 0.4), epoch(2, 0.5))]
    del trials[1][-1]
    run = make_named(tmp_path, "growing", trials).run_dir
    run.rename(runs / "growing")
    yield runs / "growing" / "trials" / "trial_00001.jsonl"
    shutil.rmtree(runs / "growing", ignore_errors=True)


def open_growing(tab: Tab, view: str) -> None:
    """Open a view of the run once the server has seen that it is there."""
    tab.open("/")
    tab.page.get_by_role("link", name="growing", exact=True).click()
    tab.wait_for_address("/run/growing")
    tab.open(f"/run/growing/{view}")


def test_typing_is_never_disturbed_by_what_happens_meanwhile(tab: Tab, growing: Path) -> None:
    open_growing(tab, "trials")
    box = tab.box("Only trials with")
    box.focus()
    seen: set[str] = set()
    text = "val_accuracy_best > 0.2"
    for number, letter in enumerate(text):
        append_events(growing, [epoch(3 + number, 0.5 + number / 100)])
        tab.page.keyboard.type(letter)
        tab.page.wait_for_timeout(150)
        assert tab.has_focus(box)
        assert box.input_value() == text[: number + 1]
        seen |= set(tab.live.get_by_role("row").filter(has_text="trial_00001").all_inner_texts())
    tab.wait_for_address("where=")
    expect(tab.region("Trials")).to_contain_text(str(2 + len(text)))
    assert tab.has_focus(box)
    assert box.input_value() == text
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("view", "name"),
    [
        ("trials", "trial_00000"),
        ("trials", "model.type"),
        ("overview", "trial_00001"),
        ("curves", "trial_00000"),
    ],
)
def test_the_focus_stays_on_a_link_while_the_sweep_goes_on(
    tab: Tab, growing: Path, view: str, name: str
) -> None:
    open_growing(tab, view)
    link = tab.live.get_by_role("link", name=name).first
    link.focus()
    for number in range(3):
        append_events(growing, [epoch(3 + number, 0.6)])
        expect_epochs(tab, view, 3 + number)
        assert tab.page.evaluate("document.activeElement.innerText").startswith(name)
    append_events(growing, [Finished(reason="all done")])
    if view == "trials":
        expect(tab.live).not_to_contain_text("training")
        assert tab.page.evaluate("document.activeElement.innerText").startswith(name)


def expect_epochs(tab: Tab, view: str, number: int) -> None:
    if view == "curves":
        tab.page.wait_for_function(
            "n => document.querySelector('.js-plotly-plot')?.data.some(t => t.x.length === n)", arg=number
        )
    else:
        expect(tab.live.get_by_role("cell", name=re.compile(rf"^{number}( of .*)?$")).first).to_be_visible()


def test_what_the_reader_opened_scrolled_and_zoomed_stays(tab: Tab, growing: Path) -> None:
    append_events(growing, [Failed(error="KeyError: 'a'", details=TRACEBACK)])
    append_events(growing, [Started(config=trial_config()), *finished(epoch(3, 0.6))[1:-1]])
    append_events(growing, [Failed(error="KeyError: 'b'", details=TRACEBACK)])
    open_growing(tab, "trial/trial_00001")
    tab.page.get_by_text("Traceback", exact=True).click()
    expect(tab.live.locator("details pre")).to_be_hidden()
    tab.page.locator(".js-plotly-plot").evaluate(
        "graph => window.Plotly.relayout(graph, {'xaxis.range': [1.5, 2.5]})"
    )
    tab.page.evaluate("window.scrollTo(0, 300)")
    append_events(growing, [Interrupted(reason="a node was lost")])
    expect(tab.region("Log")).to_contain_text("a node was lost")
    expect(tab.live.locator("details pre")).to_be_hidden()
    assert tab.page.evaluate("window.scrollY") == 300
    drawn = tab.page.locator(".js-plotly-plot").evaluate("graph => graph._fullLayout.xaxis.range")
    assert drawn == [1.5, 2.5]


_TOO_FAINT = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const parse = color => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = rgb => {
        const [r, g, b] = rgb.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        for (let at = element; at; at = at.parentElement) {
            const color = parse(getComputedStyle(at).backgroundColor);
            if (color[3] > 250) return color;
        }
        return [255, 255, 255, 255];
    };
    const faint = [], seen = new Set();
    let count = 0;
    const check = (element, color, text) => {
        count += 1;
        const both = [luminance(parse(color)), luminance(behind(element))];
        const [light, dark] = both.sort((a, b) => b - a);
        const ratio = (light + 0.05) / (dark + 0.05);
        if (ratio < 4.5) faint.push(`${text.trim().slice(0, 40)}: ${color}, ${ratio.toFixed(2)}`);
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, text = walker.currentNode.data;
        if (!text.trim() || seen.has(element) || !element.checkVisibility({checkOpacity: true})) continue;
        if (element.closest("script, style, footer, noscript")) continue;
        seen.add(element);
        const style = getComputedStyle(element);
        check(element, element.closest("svg") ? style.fill : style.color, text);
    }
    for (const input of document.querySelectorAll("input")) {
        check(input, getComputedStyle(input, "::placeholder").color, input.placeholder);
        check(input, getComputedStyle(input).color, "typed");
    }
    return {faint, count};
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(chromium: Browser, dashboard: Served, scheme: Any) -> None:
    context = chromium.new_context(color_scheme=scheme, viewport={"width": 1400, "height": 900})
    with ExitStack() as stack:
        stack.callback(context.close)
        tab = stack.enter_context(opened(context, dashboard.url))
        grounds = set()
        for view in [*VIEWS[:-1], "compare?with=other", "trial/trial_00003", "trials?where=bad"]:
            tab.open(f"/run/swept/{view}")
            if tab.live.locator("figure").count():
                tab.traces()
            found = tab.page.evaluate(_TOO_FAINT)
            assert found["count"] > 10
            assert found["faint"] == [], view
            grounds.add(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)"}


def test_on_a_phone_no_page_is_wider_than_the_screen(chromium: Browser, dashboard: Served) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    with ExitStack() as stack:
        stack.callback(context.close)
        tab = stack.enter_context(opened(context, dashboard.url))
        addresses = [f"/run/swept/{view}" for view in [*VIEWS, "compare?with=other", "trial/trial_00003"]]
        for address in ["/", *addresses, f"/run/{quote(HOSTILE)}", "/run/hostile/curves"]:
            tab.open(address)
            if tab.live.locator("figure").count():
                tab.traces()
            width = tab.page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
            assert max(width) <= 390, address


@pytest.fixture(scope="module")
def wide(runs: Path) -> str:
    """The name of a run with four grid keys of long values, twelve trials, and some that run."""
    keys = {
        "model.type": ["r2plus1d_18_kinetics", "mvit_v2_s"],
        "hp.learning_rate": [0.0001, 0.0005, 0.01],
        "train.seed": [0, 1],
        "data.augmentation": ["none", "trivial_augment_wide"],
    }
    sweep = {"grid_search": {"grid": keys}, "batch": {"effective_batch_size": 8}, "config": {}}
    trials = []
    for number, config in enumerate(itertools.islice(known_configs(load_config(sweep)), 24)):
        report = replace(epoch(1, 0.5 + number / 100), peak_memory_bytes=(58 + number) * 2**20)
        events = finished(report, replace(report, metrics=report.metrics | {"epoch": 2}), config=config)
        planned = replace(events[2], budget_bytes=900 * 2**20)
        events[1:3] = [replace(events[1], budget_bytes=900 * 2**20), planned]
        trials.append(events if number < 20 else events[:-1])
    make_named(runs, "wide", trials, **sweep)
    return "wide"


@pytest.fixture
def phone(chromium: Browser, dashboard: Served) -> Iterator[Tab]:
    """A tab as wide as a phone."""
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    with ExitStack() as stack:
        stack.callback(context.close)
        yield stack.enter_context(opened(context, dashboard.url))


def open_wide(tab: Tab, view: str = "overview") -> None:
    """Open a view of the wide run once the server has seen that it is there."""
    tab.open("/")
    tab.page.get_by_role("link", name="wide", exact=True).click()
    tab.wait_for_address("/run/wide")
    tab.open(f"/run/wide/{view}")


@pytest.mark.parametrize("view", ["curves", "tradeoffs", "probes"])
def test_on_a_phone_nothing_covers_a_figure_and_the_plot_keeps_its_height(
    phone: Tab, wide: str, view: str
) -> None:
    open_wide(phone, view)
    phone.traces()
    expect(phone.live.locator(".modebar-btn").first).to_be_hidden()
    if view != "probes":
        height = phone.page.evaluate("() => document.querySelector('.js-plotly-plot')._fullLayout._size.h")
        assert height >= 240
    if view == "curves":
        expect(phone.live.locator("ul.picked .swatch")).to_have_count(12)


_COVERED = """graph => {
    const boxes = [...graph.querySelectorAll(".textpoint text")].map(text => text.getBoundingClientRect());
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
        a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom));
}"""


def test_on_a_phone_no_label_of_parallel_coordinates_covers_another(phone: Tab, wide: str) -> None:
    open_wide(phone, "parallel")
    phone.traces()
    graph = phone.live.locator(".js-plotly-plot")
    labels = graph.locator(".textpoint text").all_text_contents()
    assert {"0", "1", "0.0001", "0.0005", "0.01"} <= {text.strip() for text in labels}
    assert graph.evaluate(_COVERED) == []
    assert "peak memory (MiB)" in graph.locator(".xtick").all_text_contents()


_HIDDEN = """region => {
    const end = region.getBoundingClientRect().right;
    return [...region.querySelectorAll("th")]
        .filter(th => th.getBoundingClientRect().right > end + 1).map(th => th.innerText);
}"""


@pytest.mark.parametrize(("view", "name"), [("overview", "Running trials"), ("trials", "Trials")])
def test_the_metric_of_a_wide_table_is_seen_and_the_rest_can_be_scrolled_to(
    chromium: Browser, dashboard: Served, wide: str, view: str, name: str
) -> None:
    context = chromium.new_context(viewport={"width": 1000, "height": 800})
    with ExitStack() as stack:
        stack.callback(context.close)
        tab = stack.enter_context(opened(context, dashboard.url))
        open_wide(tab, view)
        region = tab.page.get_by_role("region", name=name, exact=True)
        hidden = region.evaluate(_HIDDEN)
        assert hidden
        assert not [heading for heading in hidden if re.match("val_accuracy|samples/s", heading)]
        assert "gradient" in region.evaluate("region => getComputedStyle(region).backgroundImage")
        region.focus()
        for _ in range(40):
            tab.page.keyboard.press("ArrowRight")
        tab.page.wait_for_function(
            "name => { const region = document.querySelector(`[aria-label='${name}']`);"
            "return region.scrollLeft + region.clientWidth >= region.scrollWidth - 1; }",
            arg=name,
        )
        assert region.evaluate(_HIDDEN) == []


def test_space_ticks_a_trial(tab: Tab) -> None:
    tab.open("/run/swept/trials")
    box = tab.page.get_by_role("checkbox", name="pick trial_00002", exact=True)
    expect(box).not_to_be_checked()
    box.focus()
    tab.page.keyboard.press("Space")
    expect(box).to_be_checked()
    assert tab.has_focus(box)
    assert tab.address == "/run/swept/trials?pick=trial_00002"
    tab.page.keyboard.press("Enter")
    expect(box).not_to_be_checked()
    assert tab.address == "/run/swept/trials"
    box.click()
    expect(box).to_be_checked()
    tab.page.go_back()
    expect(box).not_to_be_checked()


# What goes wrong.


def test_what_an_address_asks_for_in_vain_is_told_on_the_page(tab: Tab) -> None:
    tab.open("/run/swept/nonsense?x=1")
    expect(tab.live.get_by_role("status")).to_contain_text("the view nonsense")
    expect(tab.live.get_by_role("heading", name="Where it stands")).to_be_visible()
    tab.open("/run/swept/trials?sort=speed")
    note = tab.live.locator(".misunderstood")
    expect(note).to_contain_text("sort=speed")
    tab.region("Trials").get_by_role("link", name="epochs").click()
    expect(note).to_have_count(0)


def test_a_damaged_run_is_told_and_others_are_shown(tab: Tab, runs: Path) -> None:
    tab.open("/run/damaged/trials")
    expect(tab.page.get_by_role("alert")).to_contain_text(str(runs / "damaged" / "sweep.json"))
    tab.page.get_by_role("link", name="All sweeps").click()
    tab.page.get_by_role("link", name="other", exact=True).click()
    expect(tab.live.get_by_role("heading", name="Where it stands")).to_be_visible()


def test_a_run_that_vanishes_stays_on_the_page_as_old(tab: Tab, growing: Path) -> None:
    open_growing(tab, "trials")
    expect(tab.region("Trials")).to_contain_text("trial_00001")
    shutil.rmtree(growing.parents[1])
    expect(tab.page.get_by_role("alert")).to_contain_text("What you see may be old")
    expect(tab.region("Trials")).to_contain_text("trial_00001")
    expect(tab.page.get_by_role("alert")).to_be_visible()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_falls_silent_is_told_until_it_answers_again(
    context: BrowserContext, runs: Path, tmp_path: Path, number: int
) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(served(runs, log=tmp_path / "log"))
        tab = Tab(context.new_page(), first.url)
        stack.callback(tab.page.close)
        tab.open("/run/swept/trials")
        silent = tab.page.get_by_text("The dashboard has not answered for")
        expect(silent).to_be_hidden()
        assert not tab.faults
        os.kill(first.process.pid, number)
        expect(silent).to_be_visible()
        expect(tab.region("Trials")).to_contain_text("trial_00001")
        if number == signal.SIGSTOP:
            os.kill(first.process.pid, signal.SIGCONT)
        else:
            stack.enter_context(served(runs, log=tmp_path / "log_again", port=first.port))
        expect(silent).to_be_hidden()
        tab.region("Trials").get_by_role("link", name="epochs").click()
        expect(
            tab.region("Trials").locator("th[aria-sort=descending], th[aria-sort=ascending]")
        ).to_have_count(1)
        known = "ERR_|Failed to fetch|did not respond"
        assert not [fault for fault in tab.faults if not re.search(known, fault)]
