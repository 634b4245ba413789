"""Memory that really runs out on a GPU in the middle of training, under a cap."""

from __future__ import annotations

import cloudpickle
import pytest
import torch
import toys
from torch import nn

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.events import Probed, Rescued
from tune_easytrain.memory import CudaMemory
from tune_easytrain.rescue import Rescue
from tune_easytrain.trial import TrialSpec, run_trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 2**20


def test_training_that_runs_out_of_memory_goes_on_smaller():
    events = []
    spec = TrialSpec(
        config={},
        settings=toys.make_settings(memory_budget_bytes=450 * MIB),
        task_payload=cloudpickle.dumps(toys.build_uneven_task),
        function_payload=None,
        device="cuda",
        device_share=1.0,
        num_threads=2,
        preloaded_modules=modules_to_preload(),
    )
    reports = list(run_trial(spec, events.append))
    (probe,) = [event for event in events if isinstance(event, Probed)]
    rescues = [event for event in events if isinstance(event, Rescued)]
    assert probe.microbatch_size == 8
    assert rescues[0].failed_microbatch_size == 8
    assert "out of memory" in rescues[0].message
    last = reports[-1].metrics
    assert (last["num_samples"], last["optimizer_steps"], last["num_rescues"]) == (48, 6, len(rescues))


def test_dropout_and_batch_norm_are_repeated_after_a_real_failure():
    device = torch.device("cuda")
    memory = CudaMemory(device)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).to(device)
    batch = torch.randn(8, 4, device=device)
    outputs = []

    def window(plan):
        outputs.append(model(batch))
        if plan.microbatch_size > 4:
            torch.empty(2**40, device=device)  # a terabyte or more
        return model(batch)

    second = Rescue(model, BatchPlan.build(8, 8), memory, lambda change: None).run(window)
    assert outputs[0].equal(outputs[1])
    assert not second.equal(outputs[0])
    assert int(model[0].num_batches_tracked) == 2
