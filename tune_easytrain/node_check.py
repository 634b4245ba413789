"""`NodeCheck`: what one node says of a sweep before its first trial: storage, task, data, GPUs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from tune_easytrain.child_process import ChildProcess
from tune_easytrain.cluster import on_node
from tune_easytrain.errors import ChildDiedError, StorageError
from tune_easytrain.protocol import CheckRequest
from tune_easytrain.storage import Storage


@dataclass(frozen=True, slots=True)
class StorageMarker:
    """What the driver has written to the sweep's storage, for other nodes to find."""

    storage: Storage
    name: str
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFindings:
    """What a node says.

    Attributes:
        faults: what is wrong there, a line each.
        notes: what could not be found out, a line each.
        gpu_bytes: the memory of each of its GPUs, as the driver's management library tells it; empty where
            that does not answer.
    """

    faults: Sequence[str] = ()
    notes: Sequence[str] = ()
    gpu_bytes: Sequence[int] = ()


def find_faults(
    marker: StorageMarker | None,
    request: CheckRequest | None,
    preloaded_modules: Sequence[str],
    timeout_seconds: float,
) -> NodeFindings:
    """Look for everything on this node, in this process and a child of it.

    Args:
        marker: what has to be in the storage; None: it need not be looked at.
        request: a trial to check; None: the sweep has no task.
        preloaded_modules: what trials' children import.
        timeout_seconds: how long a task may take to open its data; after that it is left to the trials.
    """
    faults, notes = list[str](), list[str]()
    if marker is not None:
        faults += _storage_faults(marker)
    if request is not None:
        child = ChildProcess(request, preloaded_modules)
        try:
            faults += child.receive(timeout_seconds)
        except TimeoutError:
            notes.append(f"opening the data takes more than {timeout_seconds:g} s, so it was not checked")
        except ChildDiedError as error:
            faults.append(f"task: {error} while it opened its data")
        except Exception as error:  # noqa: BLE001 -- a broken installation may raise anything
            faults.append(f"task: {type(error).__name__}: {error}")
        finally:
            child.kill()
    return NodeFindings(faults=tuple(faults), notes=tuple(notes), gpu_bytes=gpu_bytes())


def _storage_faults(marker: StorageMarker) -> list[str]:
    remedy = "use a folder that all nodes share, such as one on NFS, or a bucket: s3://bucket/folder"
    try:
        found = marker.storage.read(marker.name)
    except (OSError, StorageError) as error:
        return [f"run.storage: {marker.storage}: what the driver wrote is not there ({error}); {remedy}"]
    if found != marker.content:
        return [f"run.storage: {marker.storage}: another file is there than the driver wrote; {remedy}"]
    return []


def gpu_bytes() -> tuple[int, ...]:
    """Return the memory of each GPU of this machine in bytes, as torch will see it.

    Empty where NVML does not answer.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 -- no NVML, no driver, no GPU: all the same here
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_usable_bytes(pynvml, handle) for handle in handles)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _usable_bytes(pynvml: Any, handle: Any) -> int:
    """Return a GPU's memory without what the driver keeps: half a GiB of an H100, which no process gets."""
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (AttributeError, TypeError, pynvml.NVMLError):  # an old driver, or an old pynvml
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return int(info.total - info.reserved)


class NodeCheck:
    """The actor that looks for a node's faults."""

    def find_faults(self, *args: Any) -> NodeFindings:
        """Return what the function of that name finds."""
        return find_faults(*args)


def start_node_check(node_id: str) -> Any:
    """Return the handle of an actor on that node; whoever starts it also kills it."""
    actor: Any = ray.remote(NodeCheck)
    return actor.options(**on_node(node_id)).remote()
