"""The device of a trial: which one it is, and what people call it."""

from __future__ import annotations

import torch

from tune_easytrain.errors import TaskError


def device_type(name: str) -> str:
    """Return `cuda` or `cpu`; `auto` is a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name).type


def choose_device(name: str) -> torch.device:
    """Return the device of that name, `auto` included; raises TaskError for a GPU that torch does not see."""
    device = torch.device(device_type(name) if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TaskError(
            "the trial was given a GPU but torch sees none on this node; "
            "check the driver and that torch was built for CUDA"
        )
    return device


def device_name(device: torch.device) -> str:
    """Return the device's name as people know it, `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
