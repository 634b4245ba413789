"""Training in fp16 on a GPU, under a loss scale."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from tune_easytrain import Task
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.task_source import pickle_function
from tune_easytrain.trial import TrialSpec, run_trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build_task(config: dict[str, Any]) -> Task:
    """`factor` times its loss is what is minimized, at a rate that makes up for it."""
    factor = config["factor"]
    return Task(
        model=lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2)),
        loss=lambda model, batch: factor * nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1 / factor),
        train_data=lambda: toys.make_data(40),
    )


def trained(factor: float, **settings: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The last report's metrics, and the weights."""
    spec = TrialSpec(
        config={"factor": factor},
        settings=toys.make_settings(effective_batch_size=10, **settings),
        task_payload=pickle_function(build_task, "task"),
        function_payload=None,
        device="cuda",
        device_share=1.0,
        num_threads=2,
        preloaded_modules=modules_to_preload(),
    )
    for report in run_trial(spec, lambda event: None):
        load = partial(torch.load, map_location="cpu", weights_only=True)
        weights = load(report.checkpoint_path)["model"]
    return report.metrics, weights


@pytest.mark.parametrize("factor", [1e-6, 1.0])
def test_fp16_trains_to_the_weights_of_fp32_also_where_gradients_are_below_its_range(factor: float) -> None:
    options: dict[str, Any] = {"epochs": 3, "microbatch_limit": 4, "clip_norm": 1e9}
    _, full = trained(factor, **options)
    metrics, half = trained(factor, precision="fp16", **options)
    assert (metrics["num_skipped_steps"], metrics["optimizer_steps"]) == (0, 12)
    for name, weight in full.items():
        torch.testing.assert_close(half[name], weight, rtol=1e-2, atol=1e-3)
    torch.manual_seed(0)
    before = build_task({"factor": factor}).model().state_dict()
    assert (full["0.weight"] - before["0.weight"]).abs().max() > 1e-2, "trained too little to tell"


def test_a_step_that_fp16_skips_is_no_optimizer_step() -> None:
    metrics, _ = trained(1e4, precision="fp16", epochs=None, num_steps=5)
    skipped = metrics["num_skipped_steps"]
    assert skipped >= 1
    assert metrics["optimizer_steps"] == 5
    assert metrics["num_samples"] == 10 * (5 + skipped)
