"""A trial on a GPU that is told to end in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import toys

from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.errors import TerminatedError
from tune_easytrain.trial import TrialSpec, run_trial
from tune_easytrain.trial_context import load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def last_metrics(toy: dict[str, Any] | None = None, **where: Any) -> dict[str, float]:
    spec = TrialSpec(
        config={"data": {"num_samples": 40}, "toy": toy or {}},
        settings=toys.make_settings(epochs=3),
        task_payload=cloudpickle.dumps(toys.build_exact_task),
        function_payload=None,
        device="cuda",
        device_share=1.0,
        num_threads=2,
        preloaded_modules=modules_to_preload(),
        **where,
    )
    *_, last = run_trial(spec, lambda event: None)
    return last.metrics


def test_it_goes_on_from_the_same_window_and_leaves_nothing_on_the_gpu(tmp_path: Path) -> None:
    undisturbed = last_metrics()
    free_bytes, _ = torch.cuda.mem_get_info()
    store = CheckpointStore(str(tmp_path / "stored"))
    toy = {"fault": "terminate", "sample": 3, "visit": 2, "marker": str(tmp_path / "marker")}
    with pytest.raises(TerminatedError, match="in good order"):
        last_metrics(toy, store=store)
    assert torch.cuda.mem_get_info()[0] >= free_bytes - 2**20

    newest = tmp_path / "newest.pt"
    assert store.fetch_newest(newest)
    checkpoint = load_checkpoint(newest)
    assert checkpoint["progress"]["epoch"] == 1
    assert 0 <= checkpoint["part"]["num_windows"] <= 5
    resumed = last_metrics(toy, checkpoint_path=str(newest))
    for name in ("epoch", "num_samples", "optimizer_steps"):
        assert resumed[name] == undisturbed[name]
    for name in ("train_loss", "val_loss"):
        assert resumed[name] == pytest.approx(undisturbed[name], rel=1e-9)
