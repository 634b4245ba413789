"""Pictures of the dashboard for docs/images, of real sweeps in a real Chromium.

Without `--run` the CPU demo is run first, twice (about 15 minutes on two cores): nine video models with two
learning rates, once with SGD and once with Adam. `make demo` has made its data.

    pip install '.[demo,test]' && make demo
    python benchmarks/dashboard_pictures.py
    python benchmarks/dashboard_pictures.py --run RUN_DIR --other RUN_DIR

No picture shows where on this machine the runs are.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
DEMO = [
    *("--set", f"config.data.root={ROOT / 'data' / 'ucf101_demo'}"),
    *("--set", "grid_search.grid.hp.learning_rate=[0.001,0.01]"),
    *("--set", "train.epochs=4"),
]
MOST_BYTES = 150_000
NUM_COLORS = 64
WIDE = {"width": 1380, "height": 760}
PHONE = {"width": 390, "height": 760}
LIVE_SHARE = 0.55
"""How much of the sweep's time is over in the pictures of a sweep that runs."""


def run_demo(storage: Path, optimizer: str) -> Path:
    """Run the CPU demo and return its run directory."""
    before = set(storage.glob("*"))
    command = [
        *(sys.executable, "-m", "tune_easytrain", "run", str(ROOT / "configs" / "ucf101_demo.yaml"), *DEMO),
        *("--set", f"grid_search.grid.optimizer.name=[{optimizer}]", "--set", f"run.storage={storage}"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    (made,) = set(storage.glob("*")) - before
    return made


NO_CHECKPOINTS = shutil.ignore_patterns("checkpoint*")


def copy_as_it_stood(run: Path, folder: Path, share: float) -> None:
    """Copy a run directory as it was when a share of its time was over, as if that were now."""
    shutil.copytree(run, folder, ignore=NO_CHECKPOINTS)
    paths = sorted((folder / "trials").glob("*.jsonl"))
    events = {path: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}
    times = [event["time"] for found in events.values() for event in found]
    end = min(times) + share * (max(times) - min(times))
    shift = time.time() - end
    for path, found in events.items():
        kept = [event | {"time": event["time"] + shift} for event in found if event["time"] <= end]
        path.write_text("".join(f"{json.dumps(event)}\n" for event in kept))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the runs in a folder; yield the address."""
    command = [sys.executable, "-m", "tune_easytrain", "dashboard", str(folder), "--port", "0", "--no-open"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("Dashboard: ").strip()
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def opened(browser: Browser, address: str, size: dict[str, Any], scheme: Any = "light") -> Iterator[Page]:
    """Open a page and wait until all of it is drawn."""
    context = browser.new_context(viewport=size, device_scale_factor=2, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.locator("#live > *").first.wait_for()
    for graph in page.locator(".dash-graph").all():
        graph.locator(".main-svg").first.wait_for()
    page.wait_for_timeout(1500)
    yield page
    context.close()


def save(page: Page, name: str) -> None:
    """Write what the page shows, without the line that says where the run is."""
    size = page.viewport_size
    assert size is not None
    place = page.locator("#live > p:has(code)")
    last = place if place.count() else page.locator("footer")
    height = min(size["height"], last.evaluate("element => element.getBoundingClientRect().top"))
    picture = page.screenshot(clip={"x": 0, "y": 0, "width": size["width"], "height": height})
    path = IMAGES / f"dashboard-{name}.png"
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    num_bytes = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {num_bytes / 1000:.0f} kB")
    if num_bytes >= MOST_BYTES:
        raise SystemExit(f"{path} is larger than {MOST_BYTES} bytes")


def take(browser: Browser, ended: str, running: str, run: str, other: str) -> None:
    """Take every picture, from the addresses where the whole sweep and the one cut short are served."""
    metric = "val_accuracy_best"
    best = urlencode({"brush": json.dumps({metric: [0.4, 1.0]})})
    picked = urlencode({"sort": f"-{metric}", "pick": "trial_00010,trial_00016"})
    for name, address, size, scheme in [
        ("overview", f"{running}/run/{run}/overview", WIDE, "light"),
        ("trials", f"{ended}/run/{run}/trials?{picked}", WIDE, "light"),
        ("parallel", f"{ended}/run/{run}/parallel?{best}", WIDE, "light"),
        ("tradeoffs", f"{ended}/run/{run}/tradeoffs?x=samples_per_second", WIDE, "light"),
        ("probes", f"{ended}/run/{run}/probes", WIDE, "light"),
        ("compare", f"{ended}/run/{run}/compare?with={other}", WIDE, "light"),
        ("phone", f"{running}/run/{run}/overview", PHONE, "light"),
        ("dark", f"{ended}/run/{run}/curves", WIDE, "dark"),
    ]:
        with opened(browser, address, size, scheme) as page:
            save(page, name)


def main() -> None:
    """Take the pictures that the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="the run directory to show; default: run the demo")
    parser.add_argument("--other", type=Path, help="the one to compare it with")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    arguments = parser.parse_args()
    if arguments.chromium is None:
        parser.error("there is no chromium here: apt-get install chromium, or give the program as --chromium")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        storage, shown, live = (Path(folder) / name for name in ("runs", "shown", "live"))
        run = arguments.run or run_demo(storage, "sgd")
        other = arguments.other or run_demo(storage, "adam")
        shutil.copytree(run, shown / run.name, ignore=NO_CHECKPOINTS)
        shutil.copytree(other, shown / other.name, ignore=NO_CHECKPOINTS)
        copy_as_it_stood(run, live / run.name, LIVE_SHARE)
        with served(shown) as ended, served(live) as running, sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=arguments.chromium, chromium_sandbox=os.geteuid() != 0
            )
            take(browser, ended, running, run.name, other.name)
            browser.close()


if __name__ == "__main__":
    main()
