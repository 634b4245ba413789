from __future__ import annotations

import pytest
import torch

from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.memory import device_memory


def test_a_device_without_a_meter_is_refused() -> None:
    assert isinstance(device_memory(torch.device("cpu")), CpuMemory)
    with pytest.raises(ValueError, match="no memory meter for device meta"):
        device_memory(torch.device("meta"))
