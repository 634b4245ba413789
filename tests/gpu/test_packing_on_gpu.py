"""Trials that share a GPU, and one that needs two, on a real Ray of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tune_easytrain as te
from tune_easytrain.events import Planned, TrainingEnded, load_events
from tune_easytrain.memory_budget import BudgetRequest
from tune_easytrain.node_check import gpu_bytes
from tune_easytrain.run_directory import RunDirectory

pynvml = pytest.importorskip("pynvml")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STACKS = Path(__file__).parents[1] / "stacks.py"
MIB = 2**20
RELEASE_SECONDS = 15.0
"""How long the driver may take to have back what an ended process held."""

TOLERANCE_BYTES = 8 * MIB


def sweep(folder: Path, grid: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Trials of a few seconds, six of them and more at a time on one GPU."""
    return {
        "name": "packing",
        "task": f"{STACKS}:build_task",
        "config": {"data": {"num_samples": 256}, "toy": {"seconds_per_loss": 0.1}, "model": {"width": 1024}},
        "grid_search": {"grid": grid},
        "batch": {"effective_batch_size": 4},
        "train": {"num_steps": 60},
        "trial": {"resources": {"cpu": 1, "gpu": "auto"}},
        "run": {"metric": "train_loss", "mode": "min", "storage": str(folder / "runs")},
        **changes,
    }


class GpuWatch:
    """What the driver says of all GPUs: their memory in use, and which processes have some."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]

    def used_bytes(self) -> list[int]:
        return [int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used) for gpu in self._gpus]

    def pids(self) -> list[set[int]]:
        return [{p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)} for gpu in self._gpus]

    def is_as_before(self, used_bytes: list[int], pids: list[set[int]]) -> bool:
        """Wait until no GPU holds more than it did, and no process that it did not."""
        end = time.monotonic() + RELEASE_SECONDS
        while time.monotonic() < end:
            used = zip(self.used_bytes(), used_bytes, strict=True)
            users = zip(self.pids(), pids, strict=True)
            if all(now <= then + TOLERANCE_BYTES for now, then in used) and all(
                now <= then for now, then in users
            ):
                return True
            time.sleep(0.2)
        return False

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """Write down again and again how many processes have memory on a GPU, this one left out."""
        counts, is_over = list[int](), threading.Event()
        before = set.union(*self.pids())

        def count() -> None:
            while not is_over.wait(0.02):
                counts.append(len(set.union(*self.pids()) - before))

        thread = threading.Thread(target=count)
        thread.start()
        try:
            yield counts
        finally:
            is_over.set()
            thread.join()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from tune_easytrain.cluster import ray_session

    with ray_session("local"):
        yield


@pytest.fixture
def watch() -> Iterator[GpuWatch]:
    """Fails a test after which a GPU holds more than before."""
    torch.cuda.mem_get_info()  # this process's own context must not count
    watch = GpuWatch()
    used_bytes, pids = watch.used_bytes(), watch.pids()
    yield watch
    assert watch.is_as_before(used_bytes, pids), (used_bytes, watch.used_bytes(), pids, watch.pids())


def most_at_once(results: te.SweepResults) -> int:
    """The most trials that were training at the same time, by their events."""
    directory, moments = RunDirectory.open(results.run_dir), list[tuple[float, int]]()
    for name in directory.trial_ids():
        events = list(load_events(directory.trial_path(name)))
        moments.append((min(event.time for event in events if isinstance(event, Planned)), 1))
        moments.append((max(event.time for event in events if isinstance(event, TrainingEnded)), -1))
    running, most = 0, 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most


def test_the_driver_library_tells_the_memory_that_torch_sees() -> None:
    for index, size in enumerate(gpu_bytes()):
        assert abs(size - torch.cuda.get_device_properties(index).total_memory) < 64 * MIB


@pytest.mark.usefixtures("local_ray")
def test_small_trials_share_a_gpu_and_leave_nothing_on_it(watch: GpuWatch, tmp_path: Path) -> None:
    grid = {"model.num_blocks": [2, 8], "hp.learning_rate": [1e-3, 1e-4]}
    with watch.counting() as counts:
        results = te.run(sweep(tmp_path, grid), quiet=True)
    frame = results.frame()
    assert frame["state"].tolist() == ["finished"] * 4, frame["error"].tolist()
    assert frame["num_rescues"].tolist() == [0] * 4
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    (budget_bytes,) = set(frame["memory_budget_bytes"])
    assert budget_bytes == BudgetRequest(device_share=0.1).gpu_budget_bytes(total_bytes)
    assert (frame["peak_memory_bytes"] <= budget_bytes).all()
    assert (frame["peak_memory_bytes"] > 4 * 4 * 4 * MIB).all()  # weights, gradients, Adam's two
    assert most_at_once(results) >= 2
    assert max(counts) >= 2


@pytest.mark.parametrize("loader_workers", [0, 2])
@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_has_ended_holds_nothing_while_the_next_one_trains(
    watch: GpuWatch, tmp_path: Path, loader_workers: int
) -> None:
    """One at a time, and no two of their processes have memory at the same time, probes included."""
    one_at_a_time = sweep(tmp_path, {"model.num_blocks": [2, 3, 4]})
    one_at_a_time["run"]["max_concurrent"] = 1
    one_at_a_time["train"] = {"num_steps": 5, "loader_workers": loader_workers}
    with watch.counting() as counts:
        results = te.run(one_at_a_time, quiet=True)
    assert results.frame()["state"].tolist() == ["finished"] * 3
    assert most_at_once(results) == 1
    assert set(counts) == {0, 1}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.usefixtures("local_ray")
def test_what_fits_on_no_gpu_is_shared_out_among_two(watch: GpuWatch, tmp_path: Path) -> None:
    """1.3 GiB by itself, 0.7 GiB for each of two workers, and 1 GiB is allowed."""
    large = sweep(
        tmp_path,
        {"model.num_blocks": [2, 8]},
        config={"data": {"num_samples": 32}, "model": {"width": 2048}},
        batch={"effective_batch_size": 4, "memory_budget": "1GiB"},
        train={"epochs": 1},
    )
    small, big = te.run(large, quiet=True).frame().to_dict("records")
    assert (small["state"], small["num_workers"], small["error"]) == ("finished", 1, "")
    assert (big["state"], big["num_workers"], big["error"]) == ("finished", 2, "")
    assert (small["memory.sharding"], big["memory.sharding"]) == ("none", "full")
    assert big["peak_memory_bytes"] <= big["memory_budget_bytes"] <= 1024 * MIB
    assert big["optimizer_steps"] == 8
