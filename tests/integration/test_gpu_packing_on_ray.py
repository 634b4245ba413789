"""Where Ray puts trials whose GPUs were chosen by their estimates: nodes of two and three GPUs by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pytest
from test_gpu_packing import request_for_stacks

from tune_easytrain.accelerators import find_accelerator
from tune_easytrain.trial_request import TrialRequest

QUICK = {
    "RAY_gcs_create_placement_group_retry_max_interval_ms": "100",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}

SCRIPT = '''
import json, sys, time

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune_easytrain.cluster import placement
from tune_easytrain.trial_request import TrialRequest

SETTLED_SECONDS, LOST_SECONDS = 0.3, 10.0
requests = [TrialRequest(**values) for values in json.loads(sys.argv[1])]


@ray.remote(num_cpus=0)
def place():
    return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()


def places(number, group):
    """The node and the GPUs of each of a trial's workers, as a process in its bundle sees them."""
    request = requests[number]
    return ray.get([
        place.options(
            num_gpus=request.gpu,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(request.num_workers)
    ])


def newly_placed(waiting, patience_seconds):
    """Wait until some are placed, and then until no more are."""
    placed, last = {}, time.monotonic()
    while waiting and time.monotonic() - last < (SETTLED_SECONDS if placed else patience_seconds):
        for number, group in list(waiting.items()):
            if placement_group_table(group)["state"] == "CREATED":
                placed[number] = waiting.pop(number)
                last = time.monotonic()
        time.sleep(0.05)
    return placed


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 16, "num_gpus": 2})
cluster.add_node(num_cpus=16, num_gpus=3)
try:
    ray.init(address=cluster.address, log_to_driver=False)
    waiting = {number: placement(request)() for number, request in enumerate(requests)}
    running, there = {}, {}
    while waiting:
        placed = newly_placed(waiting, SETTLED_SECONDS if running else LOST_SECONDS)
        if not placed and not running:
            break  # not even on free GPUs
        running |= placed
        there |= {number: places(number, group) for number, group in placed.items()}
        print("moment:", json.dumps({number: there[number] for number in running}), flush=True)
        for number in list(running)[: max(1, len(running) // 2)]:  # the first to come end
            remove_placement_group(running.pop(number))
finally:
    ray.shutdown()
    cluster.shutdown()
'''

Place = tuple[str, int]
Moment = dict[int, list[list[Place]]]
"""The GPUs of each worker of every trial that runs: their node and their number there."""


@pytest.fixture(scope="module")
def requests() -> list[TrialRequest]:
    """What trials ask for on five H100: shares of 0.15, 0.6 and 0.9, one GPU, two of them and four."""
    num_blocks = [1, 8, 4, 1, 4, 6, 1, 16, 1, 4, 8, 1]
    return request_for_stacks(find_accelerator("H100 80GB"), 5, num_blocks, 16384)


@pytest.fixture(scope="module")
def moments(requests: list[TrialRequest], tmp_path_factory: pytest.TempPathFactory) -> list[Moment]:
    """Who was where, each time after some trials had ended and others had been placed."""
    script: Path = tmp_path_factory.mktemp("packing") / "drive.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([asdict(request) for request in requests])],
        capture_output=True, text=True, check=False, env=os.environ | QUICK,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("moment: ") for line in done.stdout.splitlines() if line.startswith("moment: ")]
    return [
        {
            int(number): [[(node, int(gpu)) for gpu in gpus] for node, gpus in workers]
            for number, workers in json.loads(moment).items()
        }
        for moment in told
    ]


def test_every_trial_is_placed(requests: list[TrialRequest], moments: list[Moment]) -> None:
    assert {(request.gpu, request.num_workers) for request in requests} == {
        (0.15, 1), (0.6, 1), (0.9, 1), (1.0, 2), (1.0, 4)
    }  # fmt: skip
    assert set(chain.from_iterable(moments)) == set(range(len(requests)))


def test_no_gpu_is_ever_given_out_more_than_once(requests: list[TrialRequest], moments: list[Moment]) -> None:
    for moment in moments:
        taken = defaultdict[Place, float](float)
        for number, workers in moment.items():
            for gpu in chain.from_iterable(workers):
                taken[gpu] += requests[number].gpu
        assert all(share <= 1 + 1e-6 for share in taken.values()), moment


def test_whoever_has_a_whole_gpu_has_it_alone(requests: list[TrialRequest], moments: list[Moment]) -> None:
    for moment in moments:
        users = defaultdict[Place, list[int]](list)
        for number, workers in moment.items():
            assert len(workers) == requests[number].num_workers
            assert all(len(gpus) == 1 for gpus in workers), "a worker uses one GPU"
            for gpu in chain.from_iterable(workers):
                users[gpu].append(number)
        for numbers in users.values():
            assert len(numbers) == 1 or all(requests[number].gpu < 1 for number in numbers), moment


def test_small_trials_share_gpus_rather_than_wait(moments: list[Moment]) -> None:
    first = moments[0]
    assert len(first) > len(set(chain.from_iterable(chain.from_iterable(first.values()))))
