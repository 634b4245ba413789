"""examples/ucf101.py alone, as `ray submit` leaves it on a head node, on real clips."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tune_easytrain as te

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL_TRIAL = [
    "train.epochs=1",
    "train.loader_workers=0",
    "trial.resources.gpu=0",
    "trial.resources.cpu=1",
    "config.data.frames=8",
    "config.data.size=32",
    "batch.effective_batch_size=10",
    "batch.memory_budget=1500MiB",
]
SMALL = [
    "grid_search.grid.model.type=[s3d, r3d_18]",
    "grid_search.grid.hp.batch_size=[8, 8]",
    *SMALL_TRIAL,
]


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("UCF101", "TUNE_E"))
    }
    return subprocess.run(
        [sys.executable, "ucf101.py", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def lone_script(tmp_path: Path) -> Path:
    folder = tmp_path / "head_node"
    folder.mkdir()
    shutil.copy(EXAMPLES / "ucf101.py", folder)
    return folder


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("make_demo_data", EXAMPLES / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("clips") / "data"
    module.make_demo_data(folder)
    return folder


def test_the_script_alone_trains_on_real_clips(lone_script, demo_data, tmp_path):
    overrides = [argument for value in SMALL for argument in ("--set", value)]
    done = run_script(
        lone_script, "--data-root", str(demo_data), "--storage", str(tmp_path / "runs"),
        "--address", "local", "--max-experiments", "1", *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    (row,) = te.load_results(run_dir).frame().to_dict("records")
    assert row["model.type"] == "s3d"
    assert row["state"] == "finished"
    assert row["effective_batch_size"] == 10
    assert row["num_samples"] == 36
    assert row["optimizer_steps"] == 4
    assert row["microbatch_size"] == 5
    assert "s3d" in done.stdout


def test_without_a_gpu_the_full_sweep_says_so_before_anything_starts(lone_script, demo_data):
    done = run_script(lone_script, "--data-root", str(demo_data), "--address", "local")
    assert done.returncode == 2
    assert "trial.resources.gpu=0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (lone_script / "runs").exists()
