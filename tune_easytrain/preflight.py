"""What is checked on the cluster before a sweep's first trial: all faults at once, and nothing started.

Every node that may run a trial looks whether it sees the sweep's storage, can load the task and finds the
data. Nodes that an autoscaler has yet to start cannot be asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from rich.console import Console

from tune_easytrain.accelerators import Accelerator
from tune_easytrain.byte_size import format_bytes
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.cluster import alive_nodes, check_resources, count_gpus, fits
from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import (
    EstimateError,
    InsufficientResourcesError,
    PreflightError,
    RunDirectoryError,
)
from tune_easytrain.gpu_packing import describe_packing, request_gpus
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.memory_plan import build_memory_plan, example_configs
from tune_easytrain.node_check import NodeFindings, StorageMarker, find_faults, start_node_check
from tune_easytrain.progress import say_lines
from tune_easytrain.protocol import CheckRequest
from tune_easytrain.search_space import grid_points
from tune_easytrain.storage import Storage
from tune_easytrain.trial_estimates import estimate_key, estimate_trials, estimate_with_bar
from tune_easytrain.trial_request import TrialRequest, TrialRequests

TASK_SECONDS = 60.0
_NODE_SECONDS = TASK_SECONDS + 60.0  # a node may first have to start a process


def prepare_cluster(
    config: SweepConfig, task_payload: bytes | None, max_experiments: int, console: Console
) -> TrialRequests:
    """Check the cluster, and return what each trial asks it for.

    Raises:
        InsufficientResourcesError: no node can hold a trial, and nothing else is wrong.
        PreflightError: with everything that is wrong, and on which nodes.
    """
    asked = TrialRequest.from_config(config.trial)
    is_auto = config.trial.resources.gpu == "auto"
    num_gpus = count_gpus(asked) if is_auto else 0
    if num_gpus:
        asked = asked.with_gpus(1.0)
    example, *_ = example_configs(config, 1)  # a search algorithm has them all
    findings = check_cluster(Storage.at(config.run.storage), asked, task_payload, example)
    say_lines(console, dict.fromkeys(note for found in findings for note in found.notes))
    if not is_auto:
        return TrialRequests(asked)
    if not num_gpus:
        say_lines(console, ["trial.resources.gpu: auto: there are no GPUs; trials train on the CPU"])
        return TrialRequests(asked)
    accelerator = _smallest_gpu(findings)
    if task_payload is None or accelerator is None:
        reason = "there is no task to estimate" if task_payload is None else "their memory is not known yet"
        say_lines(console, [f"trial.resources.gpu: auto: a whole GPU for each trial, since {reason}"])
        return TrialRequests(asked)
    return _packed(config, task_payload, max_experiments, accelerator, asked, num_gpus, console)


def _packed(
    config: SweepConfig,
    task_payload: bytes,
    max_experiments: int,
    accelerator: Accelerator,
    asked: TrialRequest,
    num_gpus: int,
    console: Console,
) -> TrialRequests:
    plan = build_memory_plan(
        config,
        accelerator,
        lambda configs: estimate_with_bar(task_payload, configs, asked.num_workers),
        max_experiments,
    )

    estimates = dict[tuple[str, int], MemoryEstimate | EstimateError]()

    def estimate_worker(trial_config: dict[str, Any], num_workers: int) -> MemoryEstimate | EstimateError:
        key = estimate_key(trial_config), num_workers
        if key not in estimates:
            (estimates[key],) = estimate_trials(task_payload, [trial_config], num_workers=num_workers)
        return estimates[key]

    requests = request_gpus(plan.trials, asked, num_gpus, estimate_worker)
    say_lines(console, describe_packing(requests, plan))
    return TrialRequests.of_points(asked, list(grid_points(config, max_experiments)), requests)


def _smallest_gpu(findings: Sequence[NodeFindings]) -> Accelerator | None:
    """Return the GPU with the least memory that a node has told of."""
    sizes = [size for found in findings for size in found.gpu_bytes]
    if not sizes:
        return None
    return Accelerator(f"GPU of {format_bytes(min(sizes))}", min(sizes))


def check_cluster(
    storage: Storage,
    asked: TrialRequest,
    task_payload: bytes | None,
    example: Mapping[str, Any],
) -> list[NodeFindings]:
    """Return what the nodes say that may run a trial; those of them that have no fault, all the same.

    Args:
        storage: where the sweep's results go.
        asked: what a trial asks for.
        task_payload: `build_task`, pickled by value; None where the sweep has no task.
        example: the nested config of one trial.

    Raises:
        InsufficientResourcesError: no node can hold a trial, and nothing else is wrong.
        PreflightError: with everything that is wrong, and on which node.
    """
    lacking: InsufficientResourcesError | None = None
    try:
        check_resources(asked)
    except InsufficientResourcesError as error:
        lacking = error
    request = None if task_payload is None else CheckRequest(task_payload, dict(example))
    nodes = alive_nodes()
    able = [node for node in nodes if fits(asked.bundle, node["Resources"])]
    findings = _ask_nodes(able, storage, request)
    faults = [] if lacking is None else [str(lacking)]
    told: dict[str, list[str]] = {}
    for node, found in zip(able, findings, strict=True):
        for fault in found.faults:
            told.setdefault(fault, []).append(node["NodeManagerAddress"])
    for fault, addresses in told.items():
        is_everywhere = len(addresses) == len(nodes)
        faults.append(fault if is_everywhere else f"on {', '.join(sorted(set(addresses)))}: {fault}")
    if lacking is not None and len(faults) == 1:
        raise lacking
    if faults:
        raise PreflightError(faults)
    return findings


def _ask_nodes(
    nodes: Sequence[Mapping[str, Any]], storage: Storage, request: CheckRequest | None
) -> list[NodeFindings]:
    """Ask all nodes at once; what this process is on it answers itself."""
    own_node = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in nodes if node["NodeID"] != own_node]
    modules = modules_to_preload(None if request is None else request.task_payload)
    findings = dict[str, NodeFindings]()
    with _marked(storage, needed=bool(others)) as marker:
        actors = {node_id: start_node_check(node_id) for node_id in others}
        calls = {
            node_id: actor.find_faults.remote(marker, request, modules, TASK_SECONDS)
            for node_id, actor in actors.items()
        }
        if len(others) < len(nodes):
            findings[own_node] = find_faults(None, request, modules, TASK_SECONDS)
        findings |= {node_id: _answer(call) for node_id, call in calls.items()}
        for actor in actors.values():
            ray.kill(actor)
    return [findings[node["NodeID"]] for node in nodes]


@contextmanager
def _marked(storage: Storage, *, needed: bool) -> Iterator[StorageMarker | None]:
    """Have a file in the storage for other nodes to find; None where there is nobody to look for it."""
    if not needed:
        yield None
        return
    marker = StorageMarker(storage, f".tune_easytrain_{secrets.token_hex(8)}", secrets.token_bytes(16))
    try:
        storage.write(marker.name, marker.content)
    except OSError as error:
        reason = f"cannot write to {storage}: {error.strerror}; choose another folder"
        raise RunDirectoryError(f"run.storage: {reason}") from None
    try:
        yield marker
    finally:
        storage.delete(marker.name)


def _answer(call: Any) -> NodeFindings:
    try:
        found: NodeFindings = ray.get(call, timeout=_NODE_SECONDS)
    except GetTimeoutError:
        return NodeFindings(notes=(f"it has not answered in {_NODE_SECONDS:g} s",))
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        return NodeFindings(faults=(f"no process could be started there: {reason}",))
    return found
