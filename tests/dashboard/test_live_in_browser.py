"""The dashboard in a real Chromium over a sweep that is running: everything here is seen without a reload."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tune_easytrain as te

pytest.importorskip("dash")
pytest.importorskip("playwright")

from chromium import Tab, opened
from playwright.sync_api import Browser, expect
from served_dashboard import Served, served

SWEEP = {
    "name": "live",
    "task": f"{Path(__file__).parents[1] / 'toys.py'}:build_task",
    "config": {"data": {"num_samples": 37}},
    "grid_search": {
        "grid": {
            "model.type": ["large", "small", "small", "medium"],
            "hp.batch_size": [7, 4, 4, 5],
            "toy.fault": [None, None, "bug", None],
            "toy.seconds_per_loss": [0.05, 0.08, 0.0, 0.05],
            "train.epochs": [5000, 5, 5, 5000],
        },
        "pair": [["model.type", "hp.batch_size", "toy.fault", "toy.seconds_per_loss", "train.epochs"]],
    },
    "batch": {"effective_batch_size": 10, "memory_budget": "512MiB", "probe": "off"},
    "run": {"metric": "val_accuracy", "mode": "max", "max_concurrent": 2},
}
"""The first and the last trial go on until the sweep is interrupted, the second ends, the third fails."""

RUN = "import json, sys, tune_easytrain as te; te.run(json.loads(sys.argv[1]), quiet=True)"


@dataclass
class Watched:
    """A tab that is never loaded again, and the sweep that it looks at."""

    tab: Tab
    driver: subprocess.Popen[bytes]
    storage: Path

    @property
    def run_dir(self) -> Path:
        (found,) = self.storage.glob("live_*")
        return found

    def go(self, view: str) -> None:
        """Follow the menu's link to a view."""
        self.tab.page.locator("nav.views").get_by_role("link", name=view, exact=True).click()
        expect(self.tab.page.locator("nav.views [aria-current=page]")).to_have_text(view)

    def row(self, trial_id: str) -> dict[str, str]:
        return next(row for row in self.tab.table("Trials") if row["trial"] == trial_id)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "runs").mkdir()
    with served(folder / "runs", log=folder / "log") as server:
        yield server
        assert server.log.read_text() == ""


@pytest.fixture(scope="module")
def watched(chromium: Browser, dashboard: Served) -> Iterator[Watched]:
    """The sweep, started when the browser already looks."""
    storage = dashboard.log.parent / "runs"
    sweep = SWEEP | {"run": {**SWEEP["run"], "storage": str(storage)}}
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    with opened(context, dashboard.url) as tab:
        tab.open()
        expect(tab.live).to_contain_text("There is no sweep here yet; it appears as soon as one starts.")
        tab.page.evaluate("window.wasLoadedOnce = true")
        driver = subprocess.Popen([sys.executable, "-c", RUN, json.dumps(sweep)], env=environment)
        try:
            yield Watched(tab, driver, storage)
            assert tab.page.evaluate("window.wasLoadedOnce")
        finally:
            driver.kill()
            driver.wait()
    context.close()


def test_a_sweep_appears_and_its_trials_train_end_and_fail(watched: Watched) -> None:
    tab = watched.tab
    tab.page.get_by_role("link", name=re.compile("^live_")).click()
    watched.go("Trials")
    row = tab.region("Trials").get_by_role("row").filter(has_text="trial_00001")
    expect(row).to_contain_text("training")
    seen = [watched.row("trial_00001")["epochs"]]
    while len(seen) < 4:
        expect(row.get_by_role("cell").nth(-2)).not_to_have_text(seen[-1])
        seen.append(watched.row("trial_00001")["epochs"])
    numbers = [int(epochs or 0) for epochs in seen]
    assert numbers == sorted(numbers)
    expect(row).to_contain_text("finished")
    expect(row.get_by_role("cell").nth(-2)).to_have_text("5")
    failed = tab.region("Trials").get_by_role("row").filter(has_text="trial_00002")
    expect(failed).to_contain_text("failed")
    expect(failed).to_contain_text("KeyError: 'a bug in the task'")
    watched.go("Overview")
    expect(tab.page.get_by_role("region", name="Failed trials")).to_contain_text("a bug in the task")
    assert tab.fact("Ended") == "2 of 4 trials"


def test_a_running_sweep_is_sorted_and_filtered(watched: Watched) -> None:
    tab = watched.tab
    watched.go("Trials")
    tab.box("Only trials with").fill("state == training and epochs > 0")
    expect(tab.live).to_contain_text("2 of 4 trials")
    tab.region("Trials").get_by_role("link", name="epochs", exact=True).click()
    expect(tab.region("Trials").locator("th[aria-sort=descending], th[aria-sort=ascending]")).to_have_count(1)
    orders = []
    for _ in range(3):
        rows = {row["trial"]: int(row["epochs"]) for row in tab.table("Trials")}
        assert set(rows) == {"trial_00000", "trial_00003"}
        orders.append(rows)
        followed = tab.region("Trials").get_by_role("row").filter(has_text="trial_00000")
        expect(followed.get_by_role("cell").nth(-2)).not_to_have_text(str(rows["trial_00000"]))
    assert [rows["trial_00000"] for rows in orders] == sorted({rows["trial_00000"] for rows in orders})
    assert len({tuple(rows) for rows in orders}) == 1  # the order that was asked for stays
    frame = te.load_results(watched.run_dir).frame().set_index("trial_id")
    assert frame.loc["trial_00000", "epochs"] >= orders[-1]["trial_00000"]
    tab.box("Only trials with").fill("")
    expect(tab.live).to_contain_text("4 of 4 trials")


def test_curves_grow_while_they_are_looked_at(watched: Watched) -> None:
    tab = watched.tab
    watched.go("Curves")
    tab.page.get_by_role("navigation", name="Metric").get_by_role("link", name="train_loss").click()
    expect(tab.live.locator("figcaption")).to_contain_text("train_loss")

    def num_points() -> int:
        return max(len(trace["x"]) for trace in tab.traces() if "trial_00000" in trace["name"])

    before = num_points()
    tab.page.wait_for_function(
        "n => document.querySelector('.js-plotly-plot').data.some(trace => trace.x.length > n + 2)",
        arg=before,
    )
    assert num_points() > before
    epochs, losses = [], []
    for report in te.load_results(watched.run_dir).records()[0].reports:
        epochs.append(report["epoch"])
        losses.append(report["train_loss"])
    (trace,) = [trace for trace in tab.traces() if "trial_00000" in trace["name"]]
    num_common = min(len(trace["x"]), len(epochs))
    assert trace["x"][:num_common] == epochs[:num_common]
    assert trace["y"][:num_common] == pytest.approx(losses[:num_common])


def test_a_running_sweep_is_compared_with_what_it_was_before(watched: Watched) -> None:
    tab = watched.tab
    shutil.copytree(watched.run_dir, watched.storage / "earlier")
    watched.go("Compare")
    choices = tab.page.get_by_role("navigation", name="With")
    deadline = time.monotonic() + 60
    while not choices.get_by_role("link", name="earlier").count():  # which runs there are is asked at times
        assert time.monotonic() < deadline
        watched.go("Trials")
        watched.go("Compare")
    choices.get_by_role("link", name="earlier").click()
    expect(tab.live).to_contain_text("Trials: 4 in both, 0 in a alone, 0 in b alone.")
    before = tab.region("Both sweeps").inner_text()
    expect(tab.region("Both sweeps")).not_to_have_text(before, use_inner_text=True)
    rows = {row["trial a"]: row for row in tab.table("Both sweeps")}
    assert rows["trial_00001"]["difference"] == "0"
    assert rows["trial_00001"]["samples/s b / a"] == "1"


def test_a_trial_is_followed_on_its_own_page_until_the_sweep_is_interrupted(watched: Watched) -> None:
    tab = watched.tab
    watched.go("Trials")
    tab.region("Trials").get_by_role("link", name="trial_00000").click()
    expect(tab.live.get_by_role("heading", name="trial_00000")).to_contain_text("training")
    epochs = tab.fact("Epochs")
    expect(tab.live.locator("dl > div:has(dt:text-is('Epochs')) > dd")).not_to_have_text(epochs)
    watched.driver.send_signal(signal.SIGINT)
    expect(tab.live.get_by_role("heading", name="trial_00000")).to_contain_text("interrupted")
    watched.driver.wait(60)
    watched.go("Overview")
    assert tab.fact("Time left") == "no trial is running"
