"""The probe and a trial on a real GPU, made small by memory budgets."""

from __future__ import annotations

import cloudpickle
import pytest
import torch
import toys

from tune_easytrain import find_microbatch
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.errors import NotEnoughMemoryError
from tune_easytrain.events import Planned, Probed
from tune_easytrain.probe import Outcome
from tune_easytrain.trial import TrialSpec, run_trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BUDGET_BYTES = 512 * 2**20
CONTEXT_TOLERANCE_BYTES = 64 * 2**20


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


@pytest.fixture(autouse=True)
def nothing_stays_on_the_gpu():
    free_bytes()  # this process's own context must not count
    before = free_bytes()
    yield
    assert free_bytes() >= before - CONTEXT_TOLERANCE_BYTES


@pytest.mark.parametrize(
    ("search", "start", "num_failures"), [("confirm", None, 0), ("grow", 4, 1), ("power_of_two", None, 1)]
)
def test_the_probe_finds_what_fits_into_the_budget(search, start, num_failures):
    result = find_microbatch(
        toys.build_hungry_task,
        {"num_samples": 1000},
        limit=1000,
        start=start,
        search=search,
        device="cuda",
        budget_bytes=BUDGET_BYTES,
    )
    outcomes = {a.microbatch_size: a.outcome for a in result.attempts}
    assert outcomes[result.microbatch_size] is Outcome.FITS
    assert list(outcomes.values()).count(Outcome.OUT_OF_MEMORY) >= num_failures
    assert len(outcomes) <= 2 or num_failures  # so small a net does not use what cuBLAS may take
    assert result.microbatch_size * toys.BYTES_PER_SAMPLE < BUDGET_BYTES
    assert all(a.peak_bytes <= BUDGET_BYTES for a in result.attempts)


def build_task_that_evaluates_wide(config):
    task = toys.build_hungry_task(config)
    task.predict = lambda model, batch: (batch.expand(-1, 20 * model.width) + 1, batch)
    return task


def test_evaluation_that_needs_more_than_training_is_what_limits():
    result = find_microbatch(
        build_task_that_evaluates_wide, {"num_samples": 1000}, limit=1000, device="cuda", budget_bytes=2**31
    )
    narrow = find_microbatch(
        toys.build_hungry_task, {"num_samples": 1000}, limit=1000, device="cuda", budget_bytes=2**31
    )
    assert result.microbatch_size * 20 * toys.BYTES_PER_SAMPLE < 2**31
    assert result.microbatch_size < narrow.microbatch_size
    (attempt,) = (a for a in result.attempts if a.microbatch_size == result.microbatch_size)
    assert attempt.peak_bytes > result.microbatch_size * 20 * toys.BYTES_PER_SAMPLE


def test_not_even_one_sample_fits():
    with pytest.raises(NotEnoughMemoryError, match="not even one sample"):
        find_microbatch(toys.build_hungry_task, {}, limit=8, device="cuda", budget_bytes=10 * 2**20)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_trains_under_the_budget_it_was_probed_with(precision):
    events = []
    spec = TrialSpec(
        config={"num_samples": 120},
        settings=toys.make_settings(
            effective_batch_size=50, memory_budget_bytes=BUDGET_BYTES, precision=precision
        ),
        task_payload=cloudpickle.dumps(toys.build_hungry_task),
        function_payload=None,
        device="cuda",
        device_share=1.0,
        num_threads=2,
        preloaded_modules=modules_to_preload(),
    )
    reports = list(run_trial(spec, events.append))
    (plan,) = [event for event in events if isinstance(event, Planned)]
    (probe,) = [event for event in events if isinstance(event, Probed)]
    assert plan.device == torch.cuda.get_device_name()
    assert plan.effective_batch_size == 50
    assert plan.accumulation_steps > 1
    assert plan.microbatch_size <= probe.microbatch_size
    assert [report.metrics["num_samples"] for report in reports] == [120, 240]
    assert all(report.peak_memory_bytes <= BUDGET_BYTES for report in reports)
