from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import (
    Ones,
    build_compiling_task,
    build_deep_task,
    build_hungry_task,
    build_task,
    build_uneven_task,
    make_config,
    make_settings,
)

from tune_easytrain import NotEnoughMemoryError, Task
from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.errors import (
    ChildDiedError,
    InexactBatchError,
    LoaderLostError,
    MetricError,
    TerminatedError,
    TrialHungError,
)
from tune_easytrain.events import (
    CheckpointLost,
    Event,
    Failed,
    Interrupted,
    Planned,
    Probed,
    Reported,
    Rescued,
    Started,
    TrainingEnded,
)
from tune_easytrain.probe import Outcome
from tune_easytrain.protocol import PlanChanged, Report
from tune_easytrain.task_source import pickle_function
from tune_easytrain.trial import TrialSpec, run_trial
from tune_easytrain.trial_record import TrialRecord


@dataclass
class Trial:
    """A trial on this machine's CPU, and the events it has emitted."""

    reports: Iterator[Report]
    events: list[Event] = field(default_factory=list)

    def kinds(self) -> list[type[Event]]:
        return [type(event) for event in self.events]

    def event(self, kind: type[Any]) -> Any:
        (found,) = [event for event in self.events if type(event) is kind]
        return found


def start(
    build: Any = build_task,
    *,
    config: dict[str, Any] | None = None,
    function: Any = None,
    checkpoint_path: Path | None = None,
    timeout_seconds: float | None = None,
    grace_seconds: float = 30.0,
    store: CheckpointStore | None = None,
    **settings: Any,
) -> Trial:
    events: list[Event] = []
    spec = TrialSpec(
        config=make_config() if config is None else config,
        settings=make_settings(**settings),
        task_payload=None if build is None else pickle_function(build, "task"),
        function_payload=None if function is None else pickle_function(function, "train.function"),
        device="cpu",
        device_share=1.0,
        num_threads=1,
        checkpoint_path=None if checkpoint_path is None else str(checkpoint_path),
        preloaded_modules=modules_to_preload(),
        timeout_seconds=timeout_seconds,
        grace_seconds=grace_seconds,
        store=store,
    )
    return Trial(run_trial(spec, events.append), events)


def test_a_trial_probes_plans_trains_and_ends() -> None:
    trial = start(metric="val_accuracy", mode="max", microbatch_limit=3)
    reports = list(trial.reports)
    assert trial.kinds() == [Started, Probed, Planned, Reported, Reported, TrainingEnded]
    assert not trial.event(Started).resumed
    probed, plan = trial.event(Probed), trial.event(Planned)
    assert (probed.microbatch_size, probed.bounded_by) == (3, "limit")
    assert [(a["microbatch_size"], a["outcome"]) for a in probed.attempts] == [(3, Outcome.FITS)]
    assert (plan.effective_batch_size, plan.microbatch_size, plan.accumulation_steps) == (8, 3, 3)
    assert (plan.device, plan.budget_bytes, plan.warning) == ("cpu", 2**30, "")
    assert [report.metrics["epoch"] for report in reports] == [1, 2]
    assert [report.is_final for report in reports] == [False, True]
    assert reports[-1].metrics["num_samples"] == 80
    assert reports[-1].metrics["optimizer_steps"] == 10
    assert set(reports[0].metrics) > {"train_loss", "val_loss", "val_accuracy"}
    assert trial.event(TrainingEnded).reason == "all 2 epochs done"
    assert [e.metrics for e in trial.events if isinstance(e, Reported)] == [r.metrics for r in reports]


def test_a_resumed_trial_confirms_the_size_it_had_and_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    undisturbed = start(epochs=2, microbatch_limit=3)
    first = next(undisturbed.reports)
    assert first.checkpoint_path is not None
    kept = Path(shutil.copy(first.checkpoint_path, tmp_path / "kept.pt"))
    (second,) = undisturbed.reports
    assert not Path(first.checkpoint_path).parent.exists()  # the scratch folder ends with the trial
    resumed = start(epochs=2, checkpoint_path=kept)
    (report,) = resumed.reports
    assert resumed.event(Started).resumed
    assert resumed.event(Probed).microbatch_size == 3
    for name in ("epoch", "train_loss", "val_loss", "val_accuracy", "num_samples"):
        assert report.metrics[name] == second.metrics[name]


def test_a_trial_that_cannot_even_make_its_scratch_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    trial = start()
    with pytest.raises(FileNotFoundError):
        next(trial.reports)
    assert trial.kinds() == [Started, Failed]
    assert "gone" in trial.event(Failed).error


def build_normalized_task(config: dict[str, Any]) -> Task:
    """The small classifier with BatchNorm in it."""
    model = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
    )
    return replace(build_task(config), model=model)


@pytest.mark.parametrize("metric", ["train_loss", "val_loss"])
def test_batch_norm_under_accumulation_is_said_once(metric: str) -> None:
    trial = start(build_normalized_task, microbatch_limit=3, metric=metric)
    assert len(list(trial.reports)) == 2
    assert trial.event(Planned).warning == (
        "gradients are not equal to one batch of 8: BatchNorm1d (1) sees at most 3 samples at a time; exact: "
        "GroupNorm, or one micro-batch (on a larger device, or with a smaller effective batch size)"
    )


def test_exactness_that_is_required_refuses_the_trial_before_training() -> None:
    trial = start(build_normalized_task, microbatch_limit=3, exact="required")
    with pytest.raises(InexactBatchError, match=r"batch\.exact: required"):
        next(trial.reports)
    assert trial.kinds() == [Started, Probed, Failed]
    assert trial.event(Failed).error.startswith("InexactBatchError: batch.exact: required, but gradients are")


def test_one_micro_batch_is_exact_also_with_batch_norm() -> None:
    trial = start(build_normalized_task, exact="required")
    assert len(list(trial.reports)) == 2
    assert trial.event(Planned).warning == ""


def test_an_exact_trial_that_is_rescued_into_an_inexact_one_fails_where_that_is_required() -> None:
    def build(config: dict[str, Any]) -> Task:
        return replace(build_uneven_task(config), couples_samples=True)

    options: dict[str, Any] = {"memory_budget_bytes": 450 * 2**20, "epochs": 2}
    trial = start(build, config={}, exact="required", **options)
    with pytest.raises(InexactBatchError, match="the loss, which compares samples, sees at most 2"):
        list(trial.reports)
    assert trial.kinds() == [Started, Probed, Planned, Rescued, Rescued, Failed]


def report_pid_for_ever(config: dict[str, Any], trial: Any) -> None:
    while True:
        trial.report({"train_loss": 0.0, "pid": os.getpid()})


def test_closing_a_trial_ends_its_child() -> None:
    trial = start(function=report_pid_for_ever)
    pid = int(next(trial.reports).metrics["pid"])
    os.kill(pid, 0)
    trial.reports.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert Failed not in trial.kinds()


def test_a_bug_fails_the_trial_with_its_type_and_where_it_was() -> None:
    trial = start(config=make_config(toy={"fault": "bug"}))
    with pytest.raises(KeyError, match="a bug in the task"):
        next(trial.reports)
    assert trial.kinds() == [Started, Failed]
    failed = trial.event(Failed)
    assert failed.error == "KeyError: 'a bug in the task'"
    assert "_misbehave" in failed.details


def test_a_child_that_dies_in_training_fails_the_trial() -> None:
    trial = start(config=make_config(toy={"fault": "kill"}), probe="off")
    with pytest.raises(ChildDiedError, match="SIGKILL"):
        next(trial.reports)
    assert trial.kinds() == [Started, Planned, Interrupted]


@pytest.mark.parametrize(("fault", "signal_name"), [("segfault", "SIGSEGV"), ("kill", "SIGKILL")])
def test_a_task_that_kills_its_process_at_every_size_does_not_fit(fault: str, signal_name: str) -> None:
    trial = start(config=make_config(toy={"fault": fault}), effective_batch_size=2)
    with pytest.raises(NotEnoughMemoryError, match=signal_name):
        next(trial.reports)
    attempts = trial.event(Probed).attempts
    assert [(a["microbatch_size"], a["outcome"]) for a in attempts] == [(2, Outcome.DIED), (1, Outcome.DIED)]


def test_a_segfault_in_training_fails_the_trial_with_its_name() -> None:
    trial = start(config=make_config(toy={"fault": "segfault"}), probe="off")
    with pytest.raises(ChildDiedError, match="SIGSEGV"):
        next(trial.reports)
    assert trial.kinds() == [Started, Planned, Interrupted]


def test_memory_that_really_runs_out_in_training_is_rescued() -> None:
    """Eight samples at a time fit the cap, as the probe saw; eight of the larger ones do not."""
    trial = start(build_uneven_task, config={}, memory_budget_bytes=450 * 2**20, epochs=2)
    reports = list(trial.reports)
    assert trial.event(Probed).microbatch_size == 8
    rescues = [event for event in trial.events if isinstance(event, Rescued)]
    assert rescues[0].failed_microbatch_size == 8
    assert rescues[0].message
    assert trial.event(TrainingEnded).reason == "all 2 epochs done"
    last = reports[-1].metrics
    assert (last["num_samples"], last["optimizer_steps"], last["num_rescues"]) == (48, 6, len(rescues))
    record = TrialRecord.from_events("trial_00000", trial.events)
    assert record.num_rescues == len(rescues)
    assert record.plan is not None
    assert record.plan.microbatch_size == rescues[-1].microbatch_size < 8
    assert record.plan.effective_batch_size == 8


def rescue_by_hand(config: dict[str, Any], trial: Any) -> None:
    model = trial.task.model()
    rescue, tried = trial.rescue(model), []

    def window(plan: Any) -> None:
        tried.append(plan.microbatch_size)
        if plan.microbatch_size > 2:
            raise MemoryError

    rescue.run(window)
    trial.report({"train_loss": 0.0, "num_tried": len(tried)})


def test_an_own_training_function_can_be_rescued_too() -> None:
    trial = start(function=rescue_by_hand)
    (report,) = trial.reports
    assert report.metrics["num_tried"] == 3
    assert [e.failed_microbatch_size for e in trial.events if isinstance(e, Rescued)] == [8, 4]


def train_with_another_plan(config: dict[str, Any], trial: Any) -> None:
    trial.send(PlanChanged.to(trial.batch_plan.with_steps(3)))
    trial.report({"train_loss": 0.0})


def test_a_plan_chosen_by_its_speed_is_the_trials_plan_from_then_on() -> None:
    trial = start(function=train_with_another_plan, microbatch_limit=4)
    list(trial.reports)
    first, second = (event for event in trial.events if isinstance(event, Planned))
    assert (first.microbatch_size, first.accumulation_steps) == (4, 2)
    assert (second.microbatch_size, second.accumulation_steps) == (3, 3)
    assert second.time >= first.time


def test_a_metric_that_nobody_reports_is_told_before_anything_is_tried() -> None:
    trial = start(metric="val_acuracy")
    with pytest.raises(MetricError, match="'val_acuracy' is not reported; did you mean 'val_accuracy'"):
        next(trial.reports)
    assert trial.kinds() == [Started, Failed]


def report_something_else(config: dict[str, Any], trial: Any) -> None:
    trial.report({"loss": 1.0})


def test_a_training_function_that_leaves_out_the_metric_fails() -> None:
    trial = start(function=report_something_else)
    with pytest.raises(MetricError, match=r"run\.metric: 'train_loss' is not reported"):
        next(trial.reports)
    assert trial.kinds() == [Started, Probed, Planned, Failed]


def report_twice(config: dict[str, Any], trial: Any) -> None:
    assert trial.task is None
    for _ in range(2):
        trial.report({"train_loss": config["hp"]["x"]})


def test_an_own_function_needs_no_task_and_its_reports_are_counted() -> None:
    trial = start(
        None, function=report_twice, config={"hp": {"x": 4}}, probe="off", effective_batch_size=None
    )
    assert [report.metrics for report in trial.reports] == [
        {"epoch": 1, "train_loss": 4.0},
        {"epoch": 2, "train_loss": 4.0},
    ]
    assert trial.event(Planned).microbatch_size is None
    assert trial.event(TrainingEnded).reason == "the training function returned"


def test_an_effective_batch_size_beyond_the_data_is_said_once() -> None:
    trial = start(config=make_config(data={"num_samples": 5}), epochs=1)
    (report,) = trial.reports
    plan = trial.event(Planned)
    assert "only 5 samples, fewer than the effective batch size 8" in plan.warning
    assert (plan.effective_batch_size, plan.microbatch_size) == (5, 5)
    assert (report.metrics["num_samples"], report.metrics["optimizer_steps"]) == (5, 1)


def test_with_the_probe_off_the_given_size_is_used_as_it_is() -> None:
    trial = start(probe="off", microbatch_limit=5, epochs=1)
    list(trial.reports)
    assert trial.kinds() == [Started, Planned, Reported, TrainingEnded]
    plan = trial.event(Planned)
    assert (plan.microbatch_size, plan.accumulation_steps) == (4, 2)


def test_a_probe_that_finds_nothing_is_kept_all_the_same() -> None:
    trial = start(build_hungry_task, config={"num_samples": 1}, memory_budget_bytes=24 * 2**20)
    with pytest.raises(NotEnoughMemoryError):
        next(trial.reports)
    assert trial.kinds() == [Started, Probed, Failed]
    probed = trial.event(Probed)
    assert probed.microbatch_size is None
    assert [a["outcome"] for a in probed.attempts] == [Outcome.OUT_OF_MEMORY]


class Ballast(Ones):
    """A data set that holds 200 MiB."""

    def __init__(self) -> None:
        super().__init__(4)
        self.held = torch.ones(50 * 2**20)


def build_with_data_in_memory(config: dict[str, Any]) -> Task:
    return replace(build_hungry_task(config), train_data=Ballast, val_data=Ballast)


def test_on_a_cpu_data_in_memory_is_not_charged_to_the_budget() -> None:
    trial = start(
        build_with_data_in_memory, config={}, memory_budget_bytes=150 * 2**20, effective_batch_size=2
    )
    assert len(list(trial.reports)) == 2
    (attempt,) = trial.event(Probed).attempts
    assert (attempt["microbatch_size"], attempt["outcome"]) == (2, Outcome.FITS)
    assert all(report.peak_memory_bytes < 150 * 2**20 for report in trial.events if type(report) is Reported)


def deep_trial(num_samples: int, budget_bytes: int) -> Trial:
    return start(
        build_deep_task,
        config={**make_config(), "num_samples": num_samples},
        effective_batch_size=num_samples,
        memory_budget_bytes=budget_bytes,
        strategy="auto",
        epochs=1,
    )


def test_the_strategy_gives_up_only_what_the_wished_micro_batch_needs() -> None:
    loose = deep_trial(512, 2**30)
    list(loose.reports)
    assert loose.event(Planned).strategy == ""

    tight = deep_trial(4096, 2**27)
    (report,) = tight.reports
    assert "of the blocks again in the backward pass" in tight.event(Planned).strategy
    assert "4096 samples fit at once instead of" in tight.event(Planned).strategy
    assert tight.event(Probed).microbatch_size == 4096
    assert [a["outcome"] for a in tight.event(Probed).attempts] == [Outcome.FITS]
    assert report.metrics["num_rescues"] == 0

    asked = start(
        build_deep_task,
        config={**make_config(), "num_samples": 4096},
        effective_batch_size=4096,
        memory_budget_bytes=2**27,
        epochs=1,
    )
    (plain,) = asked.reports
    assert asked.event(Probed).microbatch_size < 4096
    assert report.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-6)


def test_a_compiled_trial_trains_compiled() -> None:
    options: dict[str, Any] = {
        "effective_batch_size": 8,
        "microbatch_limit": 4,
        "memory_budget_bytes": 4 * 2**30,
    }
    for is_compiled in (False, True):
        trial = start(build_compiling_task, config=make_config(), compile=is_compiled, **options)
        assert [r.metrics["train_loss"] for r in trial.reports] == pytest.approx([1.0 + is_compiled] * 2)
        (attempt,) = trial.event(Probed).attempts
        assert (attempt["microbatch_size"], attempt["outcome"]) == (4, Outcome.FITS)


def test_a_training_that_hangs_is_ended_and_where_it_was_is_told() -> None:
    trial = start(config=make_config(toy={"fault": "hang"}), probe="off", timeout_seconds=2.0)
    with pytest.raises(
        TrialHungError, match=r"training went 2 s without a report \(trial\.timeout\)"
    ) as caught:
        next(trial.reports)
    (note,) = caught.value.__notes__
    assert "_misbehave" in note
    assert "toys.py" in note
    assert trial.kinds() == [Started, Planned, Interrupted]
    interrupted = trial.event(Interrupted)
    assert interrupted.reason.startswith("TrialHungError: training went 2 s without a report")
    assert "_misbehave" in interrupted.details
    assert interrupted.is_failure


def report_a_few_times(config: dict[str, Any], trial: Any) -> None:
    for _ in range(4):
        time.sleep(0.7)
        trial.report({"train_loss": 0.0})


def test_a_training_that_is_slow_but_reports_does_not_hang() -> None:
    trial = start(function=report_a_few_times, probe="off", timeout_seconds=2.0)
    assert len(list(trial.reports)) == 4


def build_told_to_end(config: dict[str, Any]) -> Task:
    """The small classifier, whose process is told to end in its n-th loss, unless the marker is there."""
    task, marker, calls = build_task(config), Path(config["marker"]), iter(range(1, 1000))

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if next(calls) == config["told_at"] and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return task.loss(model, batch)

    return replace(task, loss=loss)


@pytest.mark.parametrize("told_at", [2, 5, 7])
def test_a_trial_whose_process_is_told_to_end_goes_on_as_if_undisturbed(tmp_path: Path, told_at: int) -> None:
    """Five losses an epoch and two of evaluation: in training, and in and after evaluation."""
    options: dict[str, Any] = {"probe": "off", "epochs": 2}
    config = make_config(marker=str(tmp_path / "marker"), told_at=told_at)
    store = CheckpointStore(str(tmp_path / "store"))
    ended = start(build_told_to_end, config=config, store=store, **options)
    reports = []
    with pytest.raises(TerminatedError, match="told to end by SIGTERM; it has ended in good order"):  # noqa: PT012
        for report in ended.reports:
            reports.append(report.metrics)  # noqa: PERF401
    assert ended.kinds()[-1] is Interrupted
    assert Failed not in ended.kinds()
    newest = tmp_path / "newest.pt"
    assert store.fetch_newest(newest)
    resumed = start(build_told_to_end, config=config, checkpoint_path=newest, **options)
    reports += [report.metrics for report in resumed.reports]
    undisturbed = [report.metrics for report in start(config=config, **options).reports]
    for mine, theirs in zip(reports, undisturbed, strict=True):
        for name in ("epoch", "train_loss", "val_loss", "val_accuracy", "num_samples", "optimizer_steps"):
            assert mine[name] == theirs[name], name


def test_where_the_checkpoint_cannot_be_stored_that_is_told(tmp_path: Path) -> None:
    config = make_config(marker=str(tmp_path / "marker"), told_at=2)
    (tmp_path / "file").touch()
    store = CheckpointStore(str(tmp_path / "file/trial_00000"))
    with pytest.raises(TerminatedError, match=r"its checkpoint is lost: cannot write to .*Not a directory"):
        next(start(build_told_to_end, config=config, probe="off", store=store).reports)


def train_until_told(config: dict[str, Any], trial: Any) -> None:
    num_done = (trial.load_checkpoint() or {"num_done": 0})["num_done"]
    trial.report({"train_loss": 0.0, "pid": os.getpid(), "num_done": num_done})
    while not trial.is_ending:
        time.sleep(0.01)
    if config["reports"]:
        trial.report({"train_loss": 1.0}, checkpoint={"num_done": num_done + 1})
    else:
        trial.end({"num_done": num_done + 1})
    os._exit(3)  # neither of them returns


@pytest.mark.parametrize("reports", [False, True])
def test_an_own_function_stores_what_it_has_when_it_is_told_to_end(tmp_path: Path, reports: bool) -> None:
    store = CheckpointStore(str(tmp_path / "store"))
    checkpoint: Path | None = None
    for number in range(2):
        trial = start(
            function=train_until_told,
            config=make_config(reports=reports),
            checkpoint_path=checkpoint,
            store=store,
            probe="off",
        )
        first = next(trial.reports).metrics
        assert first["num_done"] == number
        os.kill(int(first["pid"]), signal.SIGTERM)
        with pytest.raises(TerminatedError, match="in good order"):
            list(trial.reports)
        checkpoint = tmp_path / "newest.pt"
        assert store.fetch_newest(checkpoint)
        assert trial.kinds() == [Started, Planned, *[Reported] * (1 + reports), Interrupted]


def report_while_told(config: dict[str, Any], trial: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    trial.report({"train_loss": 0.0})  # without a checkpoint: it has yet to store one
    trial.end({"num_done": 1})


def test_a_report_without_a_checkpoint_does_not_end_a_function_that_has_one_to_store(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "store"))
    trial = start(function=report_while_told, store=store, probe="off")
    assert next(trial.reports).metrics["train_loss"] == 0.0
    with pytest.raises(TerminatedError, match="in good order"):
        next(trial.reports)
    assert store.fetch_newest(tmp_path / "newest.pt")


def go_on_whatever_it_is_told(config: dict[str, Any], trial: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3600)


def test_one_that_takes_longer_than_its_grace_is_ended() -> None:
    trial = start(function=go_on_whatever_it_is_told, probe="off", grace_seconds=0.1)
    with pytest.raises(
        ChildDiedError, match=r"SIGALRM: it was told to end by SIGTERM .* trial\.grace seconds"
    ):
        next(trial.reports)
    assert trial.kinds() == [Started, Planned, Interrupted]


def report_without_room(config: dict[str, Any], trial: Any) -> None:
    (trial.scratch_dir / "checkpoint.pt").mkdir()
    trial.report({"train_loss": 0.0}, checkpoint={})
    (trial.scratch_dir / "checkpoint.pt").rmdir()
    trial.report({"train_loss": 1.0}, checkpoint={})


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on() -> None:
    trial = start(function=report_without_room, probe="off")
    first, second = (report.checkpoint_path for report in trial.reports)
    assert first is None
    assert second is not None
    assert trial.kinds() == [Started, Planned, Reported, CheckpointLost, Reported, TrainingEnded]
    assert "cannot write" in trial.event(CheckpointLost).reason


def lose_loaders_for_ever(config: dict[str, Any], trial: Any) -> None:
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def test_loader_processes_lost_in_an_own_function_are_no_bug_of_it() -> None:
    trial = start(function=lose_loaders_for_ever, probe="off")
    with pytest.raises(LoaderLostError, match="loader processes were killed"):
        next(trial.reports)
    assert trial.kinds() == [Started, Planned, Interrupted]
