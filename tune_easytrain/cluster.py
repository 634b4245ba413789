"""The Ray cluster a sweep runs on: joining or starting it, and whether it can hold a trial at all."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tune_easytrain.config import TrialConfig
from tune_easytrain.errors import BadInputError, InsufficientResourcesError
from tune_easytrain.yaml_source import read_file

_AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's description on its head node."""

_HOST_AND_PORT = re.compile(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d+)\Z")
_CONNECT_SECONDS = 10.0
_TOLERANCE = 1e-6


@contextmanager
def ray_session(address: str | None, working_dir: str | None = None) -> Iterator[None]:
    """Connect to Ray for the time of a sweep; a connection that the caller already has is used and kept.

    Args:
        address: `local` starts a cluster of this machine that ends with the sweep; None joins the one that
            RAY_ADDRESS or this host names, or else starts a local one; anything else is an address to join.
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
    if address == "local":
        # Set rather than left to Ray: its default writes a token under the home folder, which then turns
        # authentication on for clusters that were never meant to have it. This one listens on loopback.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInputError(f"--address {address}: cannot join a Ray cluster: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


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


def resource_bundle(trial: TrialConfig) -> dict[str, float]:
    """Return what Ray sets aside for one worker of a trial, by Ray's resource names."""
    resources = trial.resources
    bundle = {"CPU": resources.cpu, **resources.custom}
    if resources.gpu:
        bundle["GPU"] = resources.gpu
    return bundle


def placement(trial: TrialConfig) -> tune.PlacementGroupFactory:
    """Return the placement group of one trial."""
    return tune.PlacementGroupFactory([resource_bundle(trial)])


def check_resources(trial: TrialConfig) -> None:
    """Raise InsufficientResourcesError unless some node, present or to come, can hold one trial."""
    bundle = resource_bundle(trial)
    present = [node["Resources"] for node in _nodes() if node["Alive"]]
    if any(_fits(bundle, node) for node in [*present, *_scalable_nodes()]):
        return
    largest = {name: max((node.get(name, 0.0) for node in present), default=0.0) for name in bundle}
    lacking = [
        f"{amount:g} {name} (the largest node has {largest[name]:g})"
        for name, amount in bundle.items()
        if amount > largest[name] + _TOLERANCE
    ]
    wanted = " and ".join(lacking) or f"{_describe(bundle)} together on one node"
    hint = "--set trial.resources.gpu=0 trains on the CPU" if "GPU" in bundle else "lower trial.resources"
    raise InsufficientResourcesError(
        f"trial.resources: each trial asks for {wanted}, which no node of the cluster has; "
        f"nodes: {'; '.join(_describe(node) for node in present) or 'none'}. {hint}, or use a larger cluster"
    )


def check_local_gpu(trial: TrialConfig) -> None:
    """Raise InsufficientResourcesError where a trial asks for a GPU and this machine has none."""
    import torch

    if trial.resources.gpu and not torch.cuda.is_available():
        raise InsufficientResourcesError(
            f"trial.resources: each trial asks for {trial.resources.gpu:g} GPU, and torch sees none on this "
            "machine; --set trial.resources.gpu=0 trains on the CPU"
        )


def trials_per_node(trial_bundle: Mapping[str, float], node_id: str) -> int:
    """Return how many trials like this one the given node runs at the same time."""
    for node in _nodes():
        if node["NodeID"] == node_id:
            resources = node["Resources"]
            return max(
                1, min(int(resources.get(name, 0) / n + _TOLERANCE) for name, n in trial_bundle.items() if n)
            )
    return 1


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _scalable_nodes() -> list[dict[str, float]]:
    """Return the resources of the node types that the autoscaler of this head can start."""
    path = _AUTOSCALER_CONFIG.expanduser()
    if not path.is_file():
        return []
    source, faults = read_file(path)
    if faults or not isinstance(source.data, dict):
        return []
    types = source.data.get("available_node_types") or {}
    return [node.get("resources") or {} for node in types.values() if node.get("max_workers", 1) != 0]


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + _TOLERANCE >= amount for name, amount in bundle.items())


def _describe(resources: Mapping[str, float]) -> str:
    names = [name for name in resources if ":" not in name and "memory" not in name]
    return ", ".join(f"{resources[name]:g} {name}" for name in names) or "nothing"
