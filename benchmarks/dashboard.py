"""How fast the dashboard's pages are: first paint, updates, and how far they are behind the sweep.

    python benchmarks/dashboard.py [--num-trials 1000] [--num-epochs 50] [--num-updates 10] [--json FILE]

A run directory of so many trials is made from events and served by `tune-easytrain dashboard`, and a real
Chromium (Debian's package, through Playwright) opens every view. Then trials that run report epochs:

- first paint: from the request of a page that this browser has never seen to its content on the screen,
- update: from the page's request to the new content on the screen,
- behind: from the event's line in the file to the new content on the screen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from tune_easytrain.config import load_config
from tune_easytrain.events import Created, Event, Finished, Planned, Probed, Reported, Started, append_events
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.search_space import known_configs

GIB = 2**30
MODELS = {
    "r3d_18": 64, "mc3_18": 64, "r2plus1d_18": 32, "s3d": 32, "mvit_v1_b": 16, "mvit_v2_s": 16, "swin3d_b": 8,
    "swin3d_s": 8, "swin3d_t": 16, "x3d_m": 24,
}  # fmt: skip
"""Models with the micro-batch that fits; of video models only the names are used."""

EFFECTIVE = (32, 64, 128, 256)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
VIEWS = ("overview", "trials", "curves", "parallel", "importance", "tradeoffs", "probes", "compare", "trial")

WATCH = """
() => {
  const asked = window.fetch;
  window.updates = [];
  window.fetch = async function (url, options) {
    const start = Date.now();
    const answer = await asked(url, options);
    if (!String(url).includes("_dash-update-component") || answer.status !== 200) return answer;
    const text = await answer.clone().text();
    if (!text.includes('"live"')) return answer;
    let last = 0;
    const observer = new MutationObserver(() => { last = Date.now(); });
    observer.observe(document.getElementById("live"),
      {subtree: true, childList: true, characterData: true, attributes: true});
    const received = Date.now();
    const settle = () => {
      // Painted: two frames after the last change, with nothing changing for a while.
      if (Date.now() - Math.max(last, received) < 150) return requestAnimationFrame(settle);
      observer.disconnect();
      window.updates.push({start: start, end: Math.max(last, received)});
    };
    requestAnimationFrame(() => requestAnimationFrame(settle));
    return answer;
  };
}
"""


def make_run(folder: Path, num_trials: int, num_epochs: int) -> RunDirectory:
    """Make a sweep of which nine tenths have run, and the last of these are running."""
    seeds = list(range(-(-num_trials // (len(MODELS) * len(EFFECTIVE) * len(RATES)))))
    grid = {
        "model.type": list(MODELS), "hp.batch_size": list(MODELS.values()), "hp.learning_rate": list(RATES),
        "batch.effective_batch_size": list(EFFECTIVE), "train.seed": seeds,
    }  # fmt: skip
    sweep = load_config(
        {
            "name": "dashboard_benchmark",
            "grid_search": {"grid": grid},
            "train": {"epochs": num_epochs},
            "run": {"metric": "val_accuracy", "mode": "max"},
        }
    )
    directory = RunDirectory.create(folder, sweep.name)
    directory.save_sweep(sweep.resolved())
    start = time.time() - 60 * num_trials
    for index, config in enumerate(known_configs(sweep, num_trials)):
        share = index / num_trials
        num_reported = num_epochs if share < 0.88 else num_epochs // 2 if share < 0.9 else 0
        events = trial_events(config, index, num_reported, start + 60 * index, is_over=share < 0.88)
        append_events(directory.trial_path(trial_id(index)), events)
    return directory


def trial_events(
    config: dict[str, Any], index: int, num_reported: int, start: float, *, is_over: bool
) -> list[Event]:
    """Return what a trial has written by the time that it has reported so many epochs."""
    events: list[Event] = [Created(time=start, config=config)]
    if not num_reported:
        return events
    fits = MODELS[config["model"]["type"]]
    effective = config["batch"]["effective_batch_size"]
    peak = (3 + index % 10) * GIB
    attempt = {"microbatch_size": fits, "outcome": "fits", "peak_bytes": peak, "seconds": 3.0, "message": ""}
    events += [
        Started(time=start, config=config),
        Probed(
            time=start + 5, microbatch_size=fits, budget_bytes=70 * GIB, bounded_by="memory",
            seconds=3.0, attempts=[attempt], limit=effective, signature=config["model"]["type"],
            cached=index % 20 != 0, estimated_peak_bytes=int(peak * 0.98),
        ),
        Planned(
            time=start + 6, device="NVIDIA H100 80GB HBM3", budget_bytes=70 * GIB,
            effective_batch_size=effective, microbatch_size=min(fits, effective),
            accumulation_steps=-(-effective // fits), num_workers=1,
        ),
    ]  # fmt: skip
    events += [report(index, epoch, start) for epoch in range(1, num_reported + 1)]
    return [*events, Finished(time=start + 59, reason="all epochs done")] if is_over else events


def report(index: int, epoch: int, start: float | None = None) -> Reported:
    """Return a trial's report of an epoch."""
    metrics = {
        "epoch": epoch, "optimizer_steps": 75 * epoch, "num_samples": 9600 * epoch, "learning_rate": 1e-3,
        "samples_per_second": 500.0 / (1 + index % 10) + index % 7, "epoch_seconds": 19.2,
        "data_wait_share": 0.03, "train_loss": 3 / (epoch + 1),
        "val_accuracy": 0.9 - 0.5 / (1 + epoch) - (index * 37 % 101) / 400,
    }  # fmt: skip
    when = time.time() if start is None else start + epoch
    return Reported(time=when, metrics=metrics, peak_memory_bytes=(3 + index % 10) * GIB)


def measure(
    browser: Browser, base: str, runs: list[RunDirectory], view: str, num_updates: int
) -> dict[str, Any]:
    """Open a view in a browser that has seen nothing yet, and let trials report."""
    run = runs[0]
    num_trials = len(list(run.trial_ids()))
    running = range(int(num_trials * 0.88) + 1, int(num_trials * 0.9))
    path = f"{base}/run/{run.path.name}/{view}"
    path += f"/{trial_id(running[0])}" if view == "trial" else ""
    path += f"?with={runs[1].path.name}" if view == "compare" else ""
    # The page's own policy lets nobody evaluate a text, and so measure it.
    context = browser.new_context(viewport={"width": 1400, "height": 900}, bypass_csp=True)
    page = context.new_page()
    start = time.perf_counter()
    page.goto(path)
    page.wait_for_selector("#live h2, #live table, #live figure, #live .note")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    first_paint = time.perf_counter() - start
    if view in ("curves", "parallel", "tradeoffs", "probes", "compare", "trial"):
        page.wait_for_selector("#live .main-svg")
    if view == "importance":
        page.wait_for_selector("#live table")
    time.sleep(2.0)
    page.evaluate(WATCH)
    updates, behind = list[float](), list[float]()
    for number in range(num_updates):
        time.sleep(1.3 + 0.1 * (number % 7))  # at another moment of the page's tick each time
        num_before = page.evaluate("window.updates.length")
        index = running[0] if view == "trial" else running[number % len(running)]
        written = time.time()
        append_events(run.trial_path(trial_id(index)), [report(index, 30 + number)])
        page.wait_for_function(f"window.updates.length > {num_before}", timeout=30_000)
        update = page.evaluate(f"window.updates[{num_before}]")
        updates.append((update["end"] - update["start"]) / 1000)
        behind.append(update["end"] / 1000 - written)
    context.close()
    return {
        "view": view,
        "first_paint_seconds": round(first_paint, 2),
        "update_seconds": round(statistics.median(updates), 3),
        "slowest_update_seconds": round(max(updates), 3),
        "behind_seconds": round(statistics.median(behind), 2),
        "most_behind_seconds": round(max(behind), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-trials", type=int, default=1000)
    parser.add_argument("--num-epochs", type=int, default=50)
    parser.add_argument("--num-updates", type=int, default=10)
    parser.add_argument("--views", nargs="*", default=VIEWS, choices=VIEWS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("there is no chromium here; apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            make_run(Path(folder), arguments.num_trials, arguments.num_epochs),
            make_run(Path(folder) / "other", arguments.num_trials, arguments.num_epochs),
        ]
        places = [str(run.path) for run in runs]
        command = [sys.executable, "-m", "tune_easytrain", "dashboard", *places, "--no-open"]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
            sync_playwright() as player,
        ):
            try:
                assert server.stdout is not None
                base = server.stdout.readline().split()[-1].rstrip("/")
                options = ["--no-sandbox"] if os.geteuid() == 0 else []
                browser = player.chromium.launch(executable_path=chromium, args=options)
                rows = [measure(browser, base, runs, view, arguments.num_updates) for view in arguments.views]
                browser.close()
            finally:
                server.terminate()
    print(f"{arguments.num_trials} trials, {arguments.num_epochs} epochs, {os.cpu_count()} cores; seconds")
    names = [name for name in rows[0] if name != "view"]
    print(f"{'view':12}", *(f"{name.removesuffix('_seconds').replace('_', ' '):>15}" for name in names))
    for row in rows:
        print(f"{row['view']:12}", *(f"{row[name]:15.2f}" for name in names))
    if arguments.json is not None:
        found = {
            "num_trials": arguments.num_trials,
            "num_epochs": arguments.num_epochs,
            "num_cores": os.cpu_count(),
        }
        arguments.json.write_text(json.dumps({**found, "views": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
