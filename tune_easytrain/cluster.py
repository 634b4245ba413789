"""The Ray cluster a sweep runs on: joining or starting it, and whether it can hold a trial at all."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_easytrain.errors import BadInputError, InsufficientResourcesError
from tune_easytrain.local_ray import names_no_cluster, on_loopback, own_token
from tune_easytrain.trial_request import ACCELERATOR_PREFIX, TrialRequest
from tune_easytrain.yaml_source import read_file

if TYPE_CHECKING:
    from tune_easytrain.config import TrialConfig

_AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's description on its head node."""

_HOST_AND_PORT = re.compile(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d+)\Z")
_CONNECT_SECONDS = 10.0
_CANNOT_CONNECT = (ConnectionError, ValueError, RuntimeError, AuthenticationError)
_TOLERANCE = 1e-6
_MOST_NODES = 1000  # no trial needs more, whatever an autoscaler may start


@contextmanager
def ray_session(address: str | None, working_dir: str | None = None) -> Iterator[None]:
    """Connect to Ray for the time of a sweep; a connection that the caller already has is used and kept.

    Args:
        address: `local` starts a cluster of this machine that ends with the sweep, and that nobody else can
            reach; None joins the one that RAY_ADDRESS or this host names, or else starts a local one;
            anything else is an address to join.
        working_dir: a folder whose code travels to every worker.

    Raises BadInputError when no cluster answers at `address`.
    """
    if ray.is_initialized():
        yield
        return
    _check_reachable(address)
    # What a sweep says is in its events and its table; Ray's own lines would bury it.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Relative paths in a sweep file mean what they mean on the command line.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if working_dir is not None:
        options["runtime_env"] = {"working_dir": str(Path(working_dir).expanduser().resolve())}
    is_own = address == "local" or (address is None and names_no_cluster())
    with ExitStack() as stack:
        if is_own:
            address = "local"
            options |= {"include_dashboard": False}
            stack.enter_context(own_token())
        with on_loopback() if is_own else nullcontext():
            _connect(address, options)
        stack.callback(ray.shutdown)
        yield


def _connect(address: str | None, options: Mapping[str, Any]) -> None:
    try:
        ray.init(address=address, **options)
    except Exception as error:  # a node that does not start in time is a bare Exception of Ray's
        if type(error) is not Exception and not isinstance(error, _CANNOT_CONNECT):
            raise
        reason = str(error).partition("\n")[0]
        if address == "local":
            remedy = "; try again when the machine is less busy" if "timed out" in reason else ""
            raise BadInputError(
                f"--address local: cannot start Ray on this machine: {reason}{remedy}"
            ) from error
        raise BadInputError(
            f"--address {address}: cannot join a Ray cluster: {reason}; if it asks for a token: "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def _check_reachable(address: str | None) -> None:
    """Raise BadInputError where nothing listens at `address`; Ray itself would try for minutes."""
    match = _HOST_AND_PORT.match(address or "")
    if match is None:
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise BadInputError(
            f"--address {address}: nothing answers there ({error}); give the address that `ray start --head` "
            "printed, or 'local'"
        ) from None


def beside_driver() -> dict[str, Any]:
    """Return the options of an actor that uses up nothing, on the node of the process that calls this.

    A sweep ends with its driver anyway; on any other node its actors would end it together with that node.
    """
    return on_node(ray.get_runtime_context().get_node_id())


def on_node(node_id: str) -> dict[str, Any]:
    """Return the options of an actor that uses up nothing, on that node and no other."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def placement(request: TrialRequest) -> tune.PlacementGroupFactory:
    """Return the placement group of one trial: a bundle for each worker.

    What drives several workers needs next to nothing, so it has no bundle of its own and is placed with rank
    0. A trial is placed whole or not at all.
    """
    if request.num_workers == 1:
        return tune.PlacementGroupFactory([request.bundle])
    return tune.PlacementGroupFactory([{}] + [request.bundle] * request.num_workers)


def check_resources(request: TrialRequest) -> None:
    """Raise InsufficientResourcesError unless the nodes, present and to come, can hold one trial."""
    present = [node["Resources"] for node in alive_nodes()]
    scalable = list(_scalable_nodes())
    bundle = request.bundle
    if any(fits(bundle, node) for node in [*present, *scalable]):
        num_workers = sum(_num_bundles(bundle, node) for node in [*present, *scalable])
        if num_workers >= request.num_workers:
            return
        raise InsufficientResourcesError(
            f"trial.num_workers: {request.num_workers} workers of {_describe(bundle)} each do not fit; the "
            f"cluster has room for {num_workers}. Lower trial.num_workers or trial.resources, or use "
            f"a larger cluster; nodes: {'; '.join(_describe(node) for node in present)}"
        )
    largest = {name: max((node.get(name, 0.0) for node in present), default=0.0) for name in bundle}
    lacking = [
        _lacking(name, amount, largest[name], present)
        for name, amount in bundle.items()
        if amount > largest[name] + _TOLERANCE
    ]
    wanted = " and ".join(lacking) or f"{_describe(bundle)} together on one node"
    hint = "--set trial.resources.gpu=0 trains on the CPU" if "GPU" in bundle else "lower trial.resources"
    there = "; ".join(_describe(node) for node in present) or "none"
    to_come = "; ".join(dict.fromkeys(_describe(node) for node in scalable))
    raise InsufficientResourcesError(
        f"trial.resources: each trial asks for {wanted}, which no node of the cluster has; nodes: {there}"
        f"{f' (and what it can start: {to_come})' if to_come else ''}. {hint}, or use a larger cluster"
    )


def _lacking(name: str, amount: float, largest: float, nodes: Sequence[Mapping[str, float]]) -> str:
    if not name.startswith(ACCELERATOR_PREFIX):
        return f"{amount:g} {name} (the largest node has {largest:g})"
    there = {
        other.removeprefix(ACCELERATOR_PREFIX)
        for node in nodes
        for other in node
        if other.startswith(ACCELERATOR_PREFIX)
    }
    wanted = name.removeprefix(ACCELERATOR_PREFIX)
    return f"accelerator_type {wanted} (the nodes have {', '.join(sorted(there)) or 'none'})"


def check_local_gpu(trial: TrialConfig) -> None:
    """Raise InsufficientResourcesError where a trial asks for a GPU and this machine has none."""
    import torch

    gpu = trial.resources.gpu
    if gpu and gpu != "auto" and not torch.cuda.is_available():
        raise InsufficientResourcesError(
            f"trial.resources: each trial asks for {gpu:g} GPU, and torch sees none on this "
            "machine; --set trial.resources.gpu=0 trains on the CPU"
        )


def trials_per_node(trial_bundle: Mapping[str, float], node_id: str) -> int:
    """Return how many workers with this bundle the given node runs at the same time."""
    for node in alive_nodes():
        if node["NodeID"] == node_id:
            return max(1, _num_bundles(trial_bundle, node["Resources"]))
    return 1


def _num_bundles(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    return min(int(node.get(name, 0.0) / amount + _TOLERANCE) for name, amount in bundle.items() if amount)


def count_gpus(request: TrialRequest) -> int:
    """Return how many GPUs there are, present and to come, for trials that ask for one besides this."""
    bundle = request.with_gpus(1.0).bundle
    nodes = [*(node["Resources"] for node in alive_nodes()), *_scalable_nodes()]
    return sum(int(node["GPU"]) for node in nodes if fits(bundle, node))


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of every node that is there: its `NodeID`, address and `Resources`."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _scalable_nodes() -> list[dict[str, float]]:
    """Return the resources of every node that the autoscaler of this head can start."""
    path = _AUTOSCALER_CONFIG.expanduser()
    if not path.is_file():
        return []
    source, faults = read_file(path)
    if faults or not isinstance(source.data, dict):
        return []
    types = source.data.get("available_node_types") or {}
    most = source.data.get("max_workers", 0)
    return [
        node.get("resources") or {}
        for node in types.values()
        for _ in range(min(node.get("max_workers", most), most or _MOST_NODES, _MOST_NODES))
    ]


def fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    """Return whether a node with these resources can hold such a bundle, once it is free."""
    return all(node.get(name, 0.0) + _TOLERANCE >= amount for name, amount in bundle.items())


def _describe(resources: Mapping[str, float]) -> str:
    names = [name for name in resources if ":" not in name and "memory" not in name]
    return ", ".join(f"{resources[name]:g} {name}" for name in names) or "nothing"
