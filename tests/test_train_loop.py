from __future__ import annotations

import gc
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sequences
import torch
import torchmetrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from toys import make_settings

from tune_easytrain import BatchPlan, NonFiniteLossError, Task, TaskError, TrialContext, window_steps
from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.errors import InexactBatchError, OutOfMemoryInTrainingError
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.loader import EpochLoader, epoch_order
from tune_easytrain.protocol import PlanChanged, Report
from tune_easytrain.random_state import seed_everything
from tune_easytrain.termination import EndRequested, Termination
from tune_easytrain.train_loop import train

CPU = torch.device("cpu")


@dataclass
class Driven:
    """What a training run reported, and a copy of each checkpoint."""

    reports: list[Report] = field(default_factory=list)
    changes: list[PlanChanged] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    was_ended: bool = False

    @property
    def weights(self) -> dict[str, Tensor]:
        return torch.load(self.checkpoints[-1], weights_only=True)["model"]

    @property
    def last(self) -> dict[str, float]:
        return self.reports[-1].metrics


def drive(
    task: Task | None,
    folder: Path,
    *,
    limit: int = 100,
    checkpoint: Path | None = None,
    is_near_edge: bool = False,
    termination: Termination | None = None,
    **settings: Any,
) -> Driven:
    """Train on the CPU with micro-batches of at most `limit` samples.

    What is told to end stores its checkpoint in the folder `store`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    driven = Driven()

    def take(report: Report | PlanChanged) -> None:
        if isinstance(report, PlanChanged):
            driven.changes.append(report)
            return
        driven.reports.append(report)
        if report.checkpoint_path is not None:
            kept = folder / f"epoch_{len(driven.reports)}.pt"
            driven.checkpoints.append(Path(shutil.copy(report.checkpoint_path, kept)))

    resolved = make_settings(**settings)
    assert resolved.effective_batch_size is not None
    context = TrialContext(
        task=task,
        device_name="cpu",
        batch_plan=BatchPlan.build(resolved.effective_batch_size, limit),
        settings=resolved,
        memory=CpuMemory(),
        scratch_dir=folder,
        checkpoint_path=checkpoint,
        send=take,
        is_near_edge=is_near_edge,
        termination=termination,
        store=CheckpointStore(str(folder / "store")),
    )
    try:
        train({}, context)
    except EndRequested:
        driven.was_ended = True
    return driven


def make_data(num_samples: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, 6, generator=generator, dtype=dtype)
    return TensorDataset(features, (features.sum(1) > 0).long())


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_task(num_samples: int = 37, learning_rate: float = 0.1, **changes: Any) -> Task:
    """A float64 classifier without anything random in it."""
    return Task(
        **{
            "model": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double(),
            "loss": cross_entropy,
            "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9),
            "train_data": lambda: make_data(num_samples),
            **changes,
        }
    )


def initial_weights(task: Task) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return task.model().state_dict()


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_accumulating_gives_the_weights_of_the_whole_batch(tmp_path: Path, limit: int) -> None:
    options: dict[str, Any] = {"effective_batch_size": 10, "epochs": 3}
    whole = drive(make_task(), tmp_path / "whole", limit=10, **options)
    parts = drive(make_task(), tmp_path / "parts", limit=limit, **options)
    for name, weight in parts.weights.items():
        torch.testing.assert_close(weight, whole.weights[name], rtol=1e-10, atol=0.0)
    for driven in (whole, parts):
        assert (driven.last["optimizer_steps"], driven.last["num_samples"]) == (12, 111)
    assert parts.last["train_loss"] == pytest.approx(whole.last["train_loss"], rel=1e-10)


def test_the_scheduler_steps_once_per_optimizer_step(tmp_path: Path) -> None:
    task = make_task(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    driven = drive(task, tmp_path, limit=3, effective_batch_size=10, epochs=2)
    assert driven.last["optimizer_steps"] == 8
    assert driven.last["learning_rate"] == pytest.approx(0.1 * 0.5**8)


def test_the_gradient_of_the_whole_window_is_clipped(tmp_path: Path) -> None:
    task = make_task(learning_rate=1.0)
    before = initial_weights(task)
    driven = drive(task, tmp_path, limit=5, effective_batch_size=37, epochs=1, clip_norm=0.01)
    moved = torch.cat([(driven.weights[name] - before[name]).flatten() for name in before])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


RATES = torch.optim.lr_scheduler


def rates_of_steps(folder: Path, **changes: Any) -> tuple[list[float], Driven]:
    """The learning rate that every optimizer step had, as the optimizer saw it."""
    seen: list[float] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        built = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        built.register_step_pre_hook(lambda self, *_: seen.append(self.param_groups[0]["lr"]))
        return built

    scheduler = changes.pop("scheduler", None)
    driven = drive(make_task(optimizer=optimizer, scheduler=scheduler), folder, **changes)
    return seen, driven


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 2.5), ("sqrt", 2.5**0.5)])
def test_the_rate_is_scaled_to_the_effective_batch_size_before_the_scheduler_begins(
    tmp_path: Path, scaling: str, factor: float
) -> None:
    seen, driven = rates_of_steps(
        tmp_path,
        scheduler=lambda optimizer: RATES.StepLR(optimizer, 1, gamma=0.5),
        effective_batch_size=10,
        epochs=1,
        limit=3,
        lr_scaling=scaling,
        base_batch_size=4,
    )
    assert seen == pytest.approx([0.1 * factor * 0.5**step for step in range(4)])
    assert driven.last["learning_rate"] == pytest.approx(0.1 * factor * 0.5**4)


def test_the_warmup_multiplies_what_the_scheduler_says_and_leaves_its_state_alone(tmp_path: Path) -> None:
    """This scheduler computes each rate from the one before."""
    options: dict[str, Any] = {
        "scheduler": lambda optimizer: RATES.CosineAnnealingLR(optimizer, 8),
        "effective_batch_size": 10,
        "epochs": 2,
    }
    cold, _ = rates_of_steps(tmp_path / "cold", **options)
    warm, driven = rates_of_steps(tmp_path / "warm", warmup_steps=6, **options)
    factors = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0, 1.0]
    assert warm == [rate * factor for rate, factor in zip(cold, factors, strict=True)]
    assert driven.reports[0].metrics["learning_rate"] == pytest.approx(cold[4] * 5 / 6)
    resumed, _ = rates_of_steps(
        tmp_path / "resumed", warmup_steps=6, checkpoint=driven.checkpoints[0], **options
    )
    assert resumed == warm[4:]


def test_a_scaled_rate_is_not_scaled_again_by_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "effective_batch_size": 10, "epochs": 2, "lr_scaling": "linear", "base_batch_size": 5
    }  # fmt: skip
    _, whole = rates_of_steps(tmp_path / "whole", **options)
    seen, _ = rates_of_steps(tmp_path / "resumed", checkpoint=whole.checkpoints[0], **options)
    assert seen == [0.2] * 4


class Seen:
    """Which samples a task has trained on, window by window; each sample's first number is its own."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    def task(self) -> Task:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            if model.training:
                self.samples += batch[0][:, 0].tolist()
            return cross_entropy(model, batch)

        return make_task(loss=loss, val_data=lambda: make_data(5, seed=1))


@pytest.mark.parametrize("num_samples", [9, 37, 50, 100])
def test_trials_of_any_effective_batch_size_see_the_same_samples_of_a_budget(
    tmp_path: Path, num_samples: int
) -> None:
    seen = {}
    for effective in (4, 10, 37):
        watched = Seen()
        driven = drive(
            watched.task(),
            tmp_path / str(effective),
            effective_batch_size=effective,
            limit=3,
            epochs=None,
            num_samples=num_samples,
        )
        epochs = -(-num_samples // 37)
        assert driven.last["num_samples"] == num_samples == len(watched.samples)
        assert (driven.last["epoch"], len(driven.reports)) == (epochs, epochs)
        assert "val_loss" in driven.last  # an epoch that ends inside is evaluated, too
        assert driven.reports[-1].reason == f"all {num_samples} samples seen"
        assert [report.is_final for report in driven.reports] == [False] * (epochs - 1) + [True]
        seen[effective] = watched.samples
    assert seen[4] == seen[10] == seen[37]


def test_a_budget_of_steps_ends_inside_an_epoch_and_goes_on_where_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"effective_batch_size": 10, "limit": 4, "epochs": None, "num_steps": 6}
    whole = drive(make_random_task(), tmp_path / "whole", **options)
    assert [report.metrics["optimizer_steps"] for report in whole.reports] == [4, 6]
    assert whole.last["num_samples"] == 37 + 20
    assert whole.reports[-1].reason == "all 6 optimizer steps done"
    resumed = drive(make_random_task(), tmp_path / "resumed", checkpoint=whole.checkpoints[0], **options)
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, whole.weights[name]), name
    again = drive(make_random_task(), tmp_path / "again", checkpoint=whole.checkpoints[1], **options)
    (report,) = again.reports
    assert (report.metrics, report.is_final) == (whole.last, True)


def expected_noise_scale(limit: int, num_epochs: int) -> float:
    """The noise scale of `make_task` with steps of ten samples, from each micro-batch's own gradient."""
    task = make_task()
    seed_everything(make_settings().seed)
    model = task.model()
    optimizer = task.optimizer(model)
    loader = EpochLoader(task, task.train_data(), CPU, seed=make_settings().seed, num_workers=0)

    def gradient(batch: Any) -> Tensor:
        parts = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    noise_average = signal_average = 0.0
    for epoch in range(num_epochs):
        windows = loader.windows(10, epoch)
        for index in range(len(windows)):
            parts = list(windows.read(index, BatchPlan.build(10, limit)))
            sizes = [len(part[0]) for part in parts]
            gradients = [gradient(part) for part in parts]
            mean = sum(n * g for n, g in zip(sizes, gradients, strict=True)) / sum(sizes)
            between = sum(n * (g - mean).square().sum() for n, g in zip(sizes, gradients, strict=True))
            noise = float(between) / (len(parts) - 1)
            noise_average = 0.99 * noise_average + 0.01 * noise
            signal_average = 0.99 * signal_average + 0.01 * (float(mean.square().sum()) - noise / sum(sizes))
            accumulate_gradients(model, cross_entropy, parts)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    return noise_average / signal_average


NOISE_OPTIONS: dict[str, Any] = {"effective_batch_size": 10, "epochs": 2, "limit": 4, "noise_scale": True}


def test_the_noise_scale_is_that_of_the_unclipped_microbatches(tmp_path: Path) -> None:
    """Of windows of ten samples as 4, 3 and 3, and of the last one of seven as 4 and 3."""
    driven = drive(make_task(), tmp_path / "on", clip_norm=0.05, **NOISE_OPTIONS)
    for num_epochs, report in enumerate(driven.reports, start=1):
        expected = expected_noise_scale(4, num_epochs)
        assert report.metrics["gradient_noise_scale"] == pytest.approx(expected, rel=1e-8)
    without = drive(make_task(), tmp_path / "off", clip_norm=0.05, **{**NOISE_OPTIONS, "noise_scale": False})
    assert "gradient_noise_scale" not in without.last
    for name, weight in driven.weights.items():
        assert torch.equal(weight, without.weights[name]), name


def noise_state(driven: Driven) -> dict[str, float]:
    state: dict[str, float] = torch.load(driven.checkpoints[-1], weights_only=True)["noise_scale"]
    return state


def test_the_noise_scale_goes_on_after_a_resume_and_counts_a_rescued_window_once(tmp_path: Path) -> None:
    whole = drive(make_task(), tmp_path / "whole", **NOISE_OPTIONS)
    resumed = drive(make_task(), tmp_path / "resumed", checkpoint=whole.checkpoints[0], **NOISE_OPTIONS)
    assert noise_state(resumed) == noise_state(whole)
    options = {**NOISE_OPTIONS, "limit": 2}
    faults = Faults(("forward", 3))  # the first window's last micro-batch, so that all are halved
    rescued = drive(faults.task(val_data=None), tmp_path / "rescued", **NOISE_OPTIONS)
    assert rescued.last["num_rescues"] == 1
    smaller = drive(make_task(), tmp_path / "smaller", **options)
    assert noise_state(rescued) == pytest.approx(noise_state(smaller), rel=1e-8)


def test_one_microbatch_has_no_noise_scale(tmp_path: Path) -> None:
    driven = drive(make_task(), tmp_path, **{**NOISE_OPTIONS, "limit": 10})
    assert "gradient_noise_scale" not in driven.last


def flat_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).sum() * 0 + 1.0


def test_patience_ends_training_and_says_why(tmp_path: Path) -> None:
    driven = drive(make_task(loss=flat_loss), tmp_path, epochs=10, patience=2)
    assert [report.is_final for report in driven.reports] == [False, False, True]
    assert driven.reports[-1].reason == "train_loss no better for 2 epochs (best in epoch 1)"


def test_the_last_epoch_is_final_and_says_so(tmp_path: Path) -> None:
    driven = drive(make_task(), tmp_path, epochs=2)
    assert [(r.metrics["epoch"], r.is_final, r.reason) for r in driven.reports] == [
        (1, False, ""),
        (2, True, "all 2 epochs done"),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training_with_the_place(tmp_path: Path, value: float) -> None:
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(model, batch) * (value if len(calls) > 6 else 1)

    with pytest.raises(NonFiniteLossError, match=f"training loss is {value} after 6 optimizer steps"):
        drive(make_task(loss=loss), tmp_path, effective_batch_size=10, epochs=5)


def test_a_validation_loss_that_is_no_number_ends_training_too(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * (1 if model.training else math.nan)

    with pytest.raises(NonFiniteLossError, match="validation loss is nan after 5 optimizer steps"):
        drive(make_task(loss=loss, val_data=lambda: make_data(5)), tmp_path)


class Noisy(Dataset[Any]):
    """Samples augmented from all three generators."""

    def __init__(self) -> None:
        self._data = make_data(37, torch.float32)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        features, label = self._data[index]
        return features + torch.rand(6) + random.random() + float(np.random.random()), label


def make_random_task() -> Task:
    return make_task(
        model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
        optimizer=lambda model: torch.optim.Adam(model.parameters()),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        train_data=Noisy,
        val_data=lambda: make_data(9, torch.float32, seed=1),
    )


def test_a_resumed_run_ends_with_bit_equal_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {"effective_batch_size": 10, "epochs": 3, "limit": 4}
    whole = drive(make_random_task(), tmp_path / "whole", **options)
    torch.rand(13)  # a new process has another random state
    resumed = drive(make_random_task(), tmp_path / "resumed", checkpoint=whole.checkpoints[0], **options)
    assert len(resumed.reports) == 2
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, whole.weights[name]), name
    for name in ("epoch", "train_loss", "val_loss", "optimizer_steps", "num_samples", "learning_rate"):
        assert resumed.last[name] == whole.last[name], name


def test_resuming_what_was_done_reports_it_again_and_trains_no_further(tmp_path: Path) -> None:
    whole = drive(make_task(), tmp_path / "whole", epochs=2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("trained again")

    resumed = drive(make_task(loss=loss), tmp_path / "resumed", checkpoint=whole.checkpoints[-1], epochs=2)
    (report,) = resumed.reports
    assert (report.metrics, report.is_final, report.reason) == (whole.last, True, "all 2 epochs done")


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 10, "patience": 3}
    whole = drive(make_task(loss=flat_loss), tmp_path / "whole", **options)
    resumed = drive(
        make_task(loss=flat_loss), tmp_path / "resumed", checkpoint=whole.checkpoints[1], **options
    )
    assert (len(whole.reports), len(resumed.reports)) == (4, 2)


def make_metric_task(**changes: Any) -> Task:
    return make_task(
        **{
            "val_data": lambda: make_data(11, seed=1),
            "predict": lambda model, batch: (model(batch[0]), batch[1]),
            "metrics": {
                "accuracy": lambda: torchmetrics.classification.MulticlassAccuracy(2, average="micro")
            },
            **changes,
        }
    )


def test_metrics_are_those_of_the_whole_validation_set(tmp_path: Path) -> None:
    task = make_metric_task()
    assert task.metric_names == ("train_loss", "val_loss", "val_accuracy")
    driven = drive(task, tmp_path, limit=4, effective_batch_size=10, epochs=1)
    model = task.model()
    model.load_state_dict(driven.weights)
    features, labels = make_data(11, seed=1).tensors
    with torch.no_grad():
        out = model(features)
    assert driven.last["val_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(out, labels)), rel=1e-12
    )
    assert driven.last["val_accuracy"] == pytest.approx(float((out.argmax(1) == labels).float().mean()))


def test_metrics_without_predict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no `predict`"):
        drive(make_metric_task(predict=None), tmp_path)


def test_a_metric_of_several_numbers_is_refused_by_name(tmp_path: Path) -> None:
    per_class = {"each": lambda: torchmetrics.classification.MulticlassAccuracy(2, average=None)}
    with pytest.raises(TaskError, match=r"metric 'each' computed \(2,\) values"):
        drive(make_metric_task(metrics=per_class), tmp_path)


def test_without_validation_data_only_the_training_loss_is_reported(tmp_path: Path) -> None:
    driven = drive(make_task(), tmp_path, epochs=1)
    assert make_task().metric_names == ("train_loss",)
    assert not any(name.startswith("val_") for name in driven.last)


def test_bf16_passes_leave_parameters_in_their_own_format(tmp_path: Path) -> None:
    formats = set()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        formats.add(out.dtype)
        return nn.functional.cross_entropy(out, batch[1])

    task = make_task(
        model=lambda: nn.Linear(6, 2), loss=loss, train_data=lambda: make_data(20, torch.float32)
    )
    driven = drive(task, tmp_path, precision="bf16")
    assert formats == {torch.bfloat16}
    assert {weight.dtype for weight in driven.weights.values()} == {torch.float32}
    assert math.isfinite(driven.last["train_loss"])


def test_the_default_loop_needs_a_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="needs a task"):
        drive(None, tmp_path)


PHASES = ("data", "forward", "loss", "backward", "clip", "evaluation")


class Faults:
    """Memory that runs out at given moments: the n-th time that a phase is reached, counted from 1."""

    def __init__(self, *moments: tuple[str, int], error: Exception | None = None) -> None:
        self.left = list(moments)
        self.error = error
        self.counts = dict.fromkeys([*PHASES, "step"], 0)
        self.sizes: list[int] = []

    def reach(self, phase: str) -> None:
        self.counts[phase] += 1
        if (phase, self.counts[phase]) in self.left:
            self.left.remove((phase, self.counts[phase]))
            raise self.error or torch.OutOfMemoryError(f"CUDA out of memory in {phase}")

    def task(self, **changes: Any) -> Task:
        """The float64 classifier of these tests, in whose every phase memory may run out."""

        class Moved(dict[str, Tensor]):
            def __init__(batch, values: dict[str, Tensor]) -> None:  # noqa: N805 -- made when moved, too
                self.reach("data")
                super().__init__(values)

        def collate(samples: list[Any]) -> Moved:
            return Moved(
                {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}
            )

        def loss(model: nn.Module, batch: Any) -> Tensor:
            if not model.training:
                self.reach("evaluation")
                return nn.functional.cross_entropy(model(batch["x"]), batch["y"])
            self.sizes.append(len(batch["x"]))
            self.reach("forward")
            out = model(batch["x"])
            out.register_hook(lambda gradient: self.reach("backward"))
            self.reach("loss")
            return nn.functional.cross_entropy(out, batch["y"])

        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            built = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            built.register_step_pre_hook(lambda *_: self.reach("step"))
            return built

        values = {
            "loss": loss,
            "optimizer": optimizer,
            "collate": collate,
            "val_data": lambda: make_data(11, seed=1),
        }
        return make_task(**{**values, **changes})

    def drive(self, folder: Path, task: Task | None = None, **options: Any) -> Driven:
        clip = nn.utils.clip_grad_norm_

        def clip_or_fail(*arguments: Any) -> Any:
            self.reach("clip")
            return clip(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.utils, "clip_grad_norm_", clip_or_fail)
            return drive(task or self.task(), folder, clip_norm=0.5, **options)


RESCUE_OPTIONS: dict[str, Any] = {"effective_batch_size": 10, "epochs": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Driven:
    return Faults().drive(tmp_path_factory.mktemp("undisturbed"), limit=10, **RESCUE_OPTIONS)


@settings(max_examples=25, deadline=None)
@given(
    limit=st.sampled_from([4, 5, 7, 10]),
    moments=st.lists(
        st.tuples(st.sampled_from(PHASES), st.integers(1, 24)), min_size=1, max_size=2, unique=True
    ),
)
def test_training_is_the_same_wherever_memory_ran_out(
    undisturbed: Driven, tmp_path_factory: pytest.TempPathFactory, limit: int, moments: list[tuple[str, int]]
) -> None:
    faults = Faults(*moments)
    driven = faults.drive(tmp_path_factory.mktemp("faults"), limit=limit, **RESCUE_OPTIONS)
    for name, weight in driven.weights.items():
        torch.testing.assert_close(weight, undisturbed.weights[name], rtol=1e-10, atol=1e-12)
    for name in ("optimizer_steps", "num_samples", "epoch"):
        assert driven.last[name] == undisturbed.last[name], name
    for mine, theirs in zip(driven.reports, undisturbed.reports, strict=True):
        assert mine.metrics["train_loss"] == pytest.approx(theirs.metrics["train_loss"], rel=1e-10)
        assert mine.metrics["val_loss"] == pytest.approx(theirs.metrics["val_loss"], rel=1e-10)
    assert driven.last["num_rescues"] == len(driven.changes) <= len(moments) - len(faults.left)
    state = torch.load(driven.checkpoints[-1], weights_only=True)
    expected_limit = driven.changes[-1].microbatch_limit if driven.changes else limit
    assert (state["microbatch_limit"], state["progress"]["num_rescues"]) == (
        expected_limit,
        len(driven.changes),
    )


@pytest.mark.parametrize("phase", ["data", "forward", "loss", "backward", "clip"])
def test_memory_that_runs_out_in_any_phase_halves_the_microbatch_for_good(tmp_path: Path, phase: str) -> None:
    faults = Faults((phase, 3))
    driven = faults.drive(tmp_path, limit=5, **RESCUE_OPTIONS)
    (change,) = driven.changes
    assert (change.failed_microbatch_size, change.microbatch_limit, change.accumulation_steps) == (5, 2, 5)
    assert change.message == f"CUDA out of memory in {phase}"
    assert faults.sizes[-4:] == [2, 2, 2, 1]  # the last window's 7 samples
    assert faults.left == []


def test_the_optimizers_step_is_never_tried_again(tmp_path: Path) -> None:
    faults = Faults(("step", 2))
    with pytest.raises(
        OutOfMemoryInTrainingError, match="inside the optimizer's step, which cannot be done again"
    ):
        faults.drive(tmp_path, limit=5, **RESCUE_OPTIONS)
    assert faults.counts["step"] == 2


def test_evaluation_that_runs_out_of_memory_leaves_the_training_size_alone(tmp_path: Path) -> None:
    faults = Faults(("evaluation", 2))
    accuracy = {"accuracy": lambda: torchmetrics.classification.MulticlassAccuracy(2, average="micro")}
    changes = {"predict": lambda model, batch: (model(batch["x"]), batch["y"]), "metrics": accuracy}
    driven = faults.drive(tmp_path / "faults", faults.task(**changes), limit=5, **RESCUE_OPTIONS)
    whole = Faults().drive(tmp_path / "whole", Faults().task(**changes), limit=5, **RESCUE_OPTIONS)
    for name in ("train_loss", "val_accuracy", "num_rescues"):
        assert driven.last[name] == whole.last[name], name
    assert driven.last["val_loss"] == pytest.approx(whole.last["val_loss"], rel=1e-12)
    assert driven.changes == []
    state = torch.load(driven.checkpoints[-1], weights_only=True)
    assert (state["microbatch_limit"], state["evaluation_microbatch_limit"]) == (5, 2)
    # Eleven samples: 4 and 4 that failed, then six of two and one in this epoch and in the next.
    assert faults.counts["evaluation"] == 2 + 6 + 6


def test_when_not_even_one_sample_fits_any_more_training_ends_and_says_so(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryInTrainingError, match="not even a single sample at a time fits any more"):
        drive(make_task(loss=loss), tmp_path, limit=5)


def make_normalized_task(faults: Faults | None = None) -> Task:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if faults is not None:
            faults.reach("forward")
        return cross_entropy(model, batch)

    return make_task(
        model=lambda: nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)
        ).double(),
        loss=loss,
        train_data=lambda: make_data(40),
    )


def test_a_rescue_that_ends_exactness_is_told_and_refused_where_it_is_required(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten samples at once are exact, two times five are not, for there is BatchNorm."""
    options: dict[str, Any] = {"limit": 10, "effective_batch_size": 10, "epochs": 2}
    driven = drive(make_normalized_task(Faults(("forward", 3), ("forward", 6))), tmp_path / "warn", **options)
    assert driven.last["num_rescues"] == 2
    (warning,) = [record for record in caplog.records if "BatchNorm1d (1) sees at most 5" in record.message]
    assert warning.message.startswith("since memory ran out, gradients are not equal to one batch of 10")
    with pytest.raises(InexactBatchError, match="BatchNorm1d"):
        drive(
            make_normalized_task(Faults(("forward", 3))), tmp_path / "required", exact="required", **options
        )


def test_required_exactness_refuses_before_anything_is_trained(tmp_path: Path) -> None:
    faults = Faults()
    with pytest.raises(InexactBatchError, match=r"batch\.exact: required"):
        drive(make_normalized_task(faults), tmp_path, limit=5, effective_batch_size=10, exact="required")
    assert faults.counts["forward"] == 0
    whole = drive(
        make_normalized_task(), tmp_path / "whole", limit=10, effective_batch_size=10, exact="required"
    )
    assert whole.last["epoch"] == 2


@pytest.mark.parametrize("failing_call", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_statistics_and_random_state_are_those_of_the_windows_start_plus_one_pass(
    tmp_path: Path, failing_call: int, loader_workers: int
) -> None:
    """Bit equal to a training in which that window had the smaller micro-batches from the beginning."""
    driven = drive(
        make_normalized_task(Faults(("forward", failing_call))),
        tmp_path,
        limit=5,
        effective_batch_size=10,
        epochs=1,
        loader_workers=loader_workers,
    )
    task, seed = make_normalized_task(), make_settings().seed
    seed_everything(seed)
    model = task.model()
    optimizer = task.optimizer(model)
    windows = EpochLoader(task, task.train_data(), CPU, seed=seed, num_workers=0).windows(10, 0)
    for index in range(4):
        limit = 5 if index < (failing_call - 1) // 2 else 2
        accumulate_gradients(model, task.loss, windows.read(index, BatchPlan.build(10, limit)))
        optimizer.step()
    assert driven.weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert driven.weights[name].equal(value), name
    assert int(driven.weights["1.num_batches_tracked"]) == sum(
        2 if index < (failing_call - 1) // 2 else 5 for index in range(4)
    )


def test_a_rescued_run_that_is_resumed_goes_on_bit_equal(tmp_path: Path) -> None:
    options: dict[str, Any] = {"effective_batch_size": 10, "epochs": 3}
    whole = drive(make_normalized_task(Faults(("forward", 3))), tmp_path / "whole", limit=5, **options)
    resumed = drive(
        make_normalized_task(), tmp_path / "resumed", limit=2, checkpoint=whole.checkpoints[0], **options
    )
    assert resumed.last["num_rescues"] == whole.last["num_rescues"] == 1
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, whole.weights[name]), name


class Clock:
    """Time that passes only where the task says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def timed_task(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Task, list[int]]]:
    """A task whose micro-batches of two take long and single samples no time, and the sizes it has seen."""
    clock = Clock()
    monkeypatch.setattr(window_steps, "time", clock)

    def build(num_samples: int = 500) -> tuple[Task, list[int]]:
        sizes: list[int] = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            sizes.append(len(batch[0]))
            clock.now += 1.0 if len(batch[0]) == 2 else 0.1
            return cross_entropy(model, batch)

        return make_task(num_samples=num_samples, loss=loss), sizes

    return build


def test_a_long_training_keeps_the_plan_that_was_fastest_in_its_first_windows(
    tmp_path: Path, timed_task: Callable[[], tuple[Task, list[int]]]
) -> None:
    options: dict[str, Any] = {"effective_batch_size": 4, "limit": 2}
    task, sizes = timed_task()
    driven = drive(task, tmp_path / "whole", epochs=2, **options)
    (change,) = driven.changes
    assert (change.microbatch_size, change.accumulation_steps, change.microbatch_limit) == (1, 4, 2)
    assert change.failed_microbatch_size is None
    # The epoch's first window and a turn of four with twos, one with ones, and one with twos again.
    assert sizes[: 10 + 16 + 8] == [2] * 10 + [1] * 16 + [2] * 8
    assert set(sizes[10 + 16 + 8 :]) == {1}
    assert driven.last["num_samples"] == 1000
    assert torch.load(driven.checkpoints[0], weights_only=True)["accumulation_steps"] == 4
    task, sizes = timed_task()
    resumed = drive(task, tmp_path / "resumed", epochs=2, checkpoint=driven.checkpoints[0], **options)
    assert set(sizes) == {1}
    assert [each.accumulation_steps for each in resumed.changes] == [4]
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, driven.weights[name]), name


BUDGET: dict[str, Any] = {"epochs": None}


@pytest.mark.parametrize(
    ("num_samples", "options"),
    [
        (500, {"probe": "off"}),
        (480, {}),
        (500, {"limit": 4}),
        (2000, {**BUDGET, "num_steps": 120}),
        (2000, {**BUDGET, "num_samples": 480}),
        (6, {**BUDGET, "num_steps": 240}),  # two steps an epoch, of which the second is short
    ],
)
def test_a_given_size_a_short_training_and_a_single_step_are_left_as_they_are(
    tmp_path: Path,
    timed_task: Callable[..., tuple[Task, list[int]]],
    num_samples: int,
    options: dict[str, Any],
) -> None:
    task, sizes = timed_task(num_samples)
    driven = drive(task, tmp_path, **{"effective_batch_size": 4, "limit": 2, "epochs": 1, **options})
    assert driven.changes == []
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("couples_samples", [False, True])
def test_one_exact_step_is_not_given_up_for_speed_where_more_would_not_be(
    tmp_path: Path, timed_task: Callable[[], tuple[Task, list[int]]], couples_samples: bool
) -> None:
    """Near the edge of memory two single samples are faster than a micro-batch of two."""
    task = replace(timed_task()[0], couples_samples=couples_samples)
    driven = drive(task, tmp_path, effective_batch_size=2, limit=2, epochs=1, is_near_edge=True)
    assert [change.accumulation_steps for change in driven.changes] == ([] if couples_samples else [2])


def test_a_budget_of_samples_may_be_a_long_training(
    tmp_path: Path, timed_task: Callable[..., tuple[Task, list[int]]]
) -> None:
    task, _ = timed_task(2000)
    driven = drive(task, tmp_path, **{**BUDGET, "num_samples": 500, "effective_batch_size": 4, "limit": 2})
    assert [change.accumulation_steps for change in driven.changes] == [4]


def test_a_rescue_ends_the_timing(tmp_path: Path, timed_task: Callable[[], tuple[Task, list[int]]]) -> None:
    task, sizes = timed_task()
    faults, loss = Faults(("forward", 5)), task.loss

    def failing(model: nn.Module, batch: Any) -> Tensor:
        faults.reach("forward")
        return loss(model, batch)

    driven = drive(replace(task, loss=failing), tmp_path, limit=2, effective_batch_size=4, epochs=1)
    (change,) = driven.changes
    assert (change.failed_microbatch_size, change.accumulation_steps) == (2, 4)
    assert sizes == [2] * 4 + [1] * (500 - 8)


def fp16_task(factor: float, **changes: Any) -> Task:
    """A float32 classifier; `factor` times its loss is what is minimized, at a rate that makes up for it."""
    return make_task(
        model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)),
        train_data=lambda: make_data(40, torch.float32),
        loss=lambda model, batch: factor * cross_entropy(model, batch),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1 / factor),
        **changes,
    )


@pytest.mark.parametrize("limit", [3, 10])
@pytest.mark.parametrize("factor", [1e-6, 1.0])
def test_fp16_trains_to_the_weights_of_fp32_also_where_gradients_are_below_its_range(
    tmp_path: Path, limit: int, factor: float
) -> None:
    options: dict[str, Any] = {"effective_batch_size": 10, "epochs": 3}
    full = drive(fp16_task(factor), tmp_path / "fp32", **options)
    options |= {"precision": "fp16", "clip_norm": 1e9}
    half = drive(fp16_task(factor), tmp_path / "fp16", limit=limit, **options)
    assert half.last["num_skipped_steps"] == 0
    for name, weight in full.weights.items():
        torch.testing.assert_close(half.weights[name], weight, rtol=1e-3, atol=1e-4)


def test_a_step_that_fp16_skips_is_no_optimizer_step(tmp_path: Path) -> None:
    def task() -> Task:
        return fp16_task(
            1e4, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        )

    options: dict[str, Any] = {"effective_batch_size": 10, "precision": "fp16", "num_steps": 5}
    driven = drive(task(), tmp_path / "whole", epochs=None, **options)
    skipped = driven.last["num_skipped_steps"]
    assert skipped >= 1
    assert driven.last["optimizer_steps"] == 5
    assert driven.last["num_samples"] == 10 * (5 + skipped)
    assert driven.last["learning_rate"] == pytest.approx(1e-5 * 0.5**5)
    resumed = drive(task(), tmp_path / "resumed", checkpoint=driven.checkpoints[0], epochs=None, **options)
    assert resumed.last["num_skipped_steps"] == skipped
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in driven.weights.items())


def test_the_gradient_is_clipped_after_the_loss_scale_is_taken_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"effective_batch_size": 40, "epochs": 1, "clip_norm": 0.01}
    full = drive(fp16_task(1.0), tmp_path / "fp32", **options)
    half = drive(fp16_task(1.0), tmp_path / "fp16", precision="fp16", **options)
    for name, weight in full.weights.items():
        torch.testing.assert_close(half.weights[name], weight, rtol=1e-4, atol=1e-5)


LENGTHS = [1 + 23 * index % 29 for index in range(40)]
"""1 to 29 tokens, without an order; 16 samples to a window are two and a half."""


def drive_sequences(
    folder: Path, *, limit: int = 4, changes: dict[str, Any] | None = None, **settings: Any
) -> Driven:
    task = sequences.make_task(
        LENGTHS,
        val_data=lambda: sequences.Sequences([40, *LENGTHS[:9]]),
        **(changes or {}),
    )
    return drive(task, folder, limit=limit, **{"effective_batch_size": 16, "epochs": 2, **settings})


@pytest.mark.parametrize("limit", [1, 4, 16])
def test_grouping_by_length_gives_the_weights_of_the_whole_batch(tmp_path: Path, limit: int) -> None:
    whole = drive_sequences(tmp_path / "whole", limit=16, group_by_length=False)
    grouped = drive_sequences(tmp_path / "grouped", limit=limit)
    for name, weight in grouped.weights.items():
        torch.testing.assert_close(weight, whole.weights[name], rtol=1e-9, atol=1e-12)
    for name in ("train_loss", "val_loss", "optimizer_steps", "num_samples"):
        assert grouped.last[name] == pytest.approx(whole.last[name], rel=1e-9), name


def test_tokens_are_counted_where_lengths_are_known(tmp_path: Path) -> None:
    plain = drive_sequences(tmp_path / "plain", group_by_length=False)
    grouped = drive_sequences(tmp_path / "grouped")
    unknown = drive_sequences(tmp_path / "unknown", changes={"lengths": None})
    assert not {"tokens_per_second", "padding_share"} & unknown.last.keys()
    for driven in (plain, grouped):
        last = driven.last
        mean_tokens = sum(LENGTHS) / len(LENGTHS)
        assert last["tokens_per_second"] / last["samples_per_second"] == pytest.approx(mean_tokens)
    padded, position = 0, 0
    order = epoch_order(40, make_settings().seed, 1)
    for size in (4, 4, 4, 4, 4, 4, 4, 4, 4, 4):
        padded += size * max(LENGTHS[index] for index in order[position : position + size])
        position += size
    assert plain.last["padding_share"] == pytest.approx(1 - sum(LENGTHS) / padded)
    assert 0 <= grouped.last["padding_share"] < 0.1 < plain.last["padding_share"]


class Shapes:
    """A loss that notes the shape of every training batch, and fails at some calls."""

    def __init__(self, *fails_at: int) -> None:
        self.seen: list[tuple[int, ...]] = []
        self._fails_at = fails_at

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        if model.training:
            self.seen.append(tuple(batch.shape))
            if len(self.seen) in self._fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return sequences.token_loss(model, batch)

    @property
    def most_tokens(self) -> int:
        return max(num_samples * length for num_samples, length in self.seen)


def test_a_rescue_halves_the_tokens_of_a_microbatch(tmp_path: Path) -> None:
    whole = drive_sequences(tmp_path / "whole", group_by_length=False)
    shapes = Shapes(1)
    rescued = drive_sequences(tmp_path / "rescued", changes={"loss": shapes})
    assert rescued.last["num_rescues"] == 1
    first, *others = shapes.seen
    assert 58 < first[0] * first[1] <= 4 * 29
    assert all(n * length <= 2 * 29 for n, length in others)
    for name, weight in rescued.weights.items():
        torch.testing.assert_close(weight, whole.weights[name], rtol=1e-9, atol=1e-12)


def test_no_microbatch_has_more_than_max_tokens(tmp_path: Path) -> None:
    shapes = Shapes()
    drive_sequences(tmp_path, limit=1, changes={"loss": shapes}, max_tokens=20)
    assert all(n == 1 or n * length <= 20 for n, length in shapes.seen)
    assert max(n for n, _ in shapes.seen) > 1  # the short ones are together, though the longest is alone
    assert max(length for _, length in shapes.seen) == 29


def test_validation_has_as_many_tokens_at_once_as_training(tmp_path: Path) -> None:
    """Its longest sample is longer than any that is trained on."""
    seen: list[tuple[int, ...]] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if not model.training:
            seen.append(tuple(batch.shape))
        return sequences.token_loss(model, batch)

    drive_sequences(tmp_path, limit=2, changes={"loss": loss}, epochs=1)
    assert seen[0] == (1, 40)
    assert sum(n for n, _ in seen) == 10
    assert all(n == 1 or n * length <= 2 * 29 for n, length in seen)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [({}, {"noise_scale": True}), ({"couples_samples": True}, {}), ({}, {"group_by_length": False})],
)
def test_microbatches_stay_random_where_that_matters(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    shapes = Shapes()
    drive_sequences(tmp_path, changes={"loss": shapes, **changes}, epochs=1, **settings)
    assert [num_samples for num_samples, _ in shapes.seen] == [4] * 10


def test_a_grouped_run_that_is_resumed_goes_on_bit_equal(tmp_path: Path) -> None:
    whole = drive_sequences(tmp_path / "whole", epochs=3)
    resumed = drive_sequences(tmp_path / "resumed", epochs=3, checkpoint=whole.checkpoints[0])
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, whole.weights[name]), name


def test_windows_of_unlike_tokens_are_timed_by_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    monkeypatch.setattr(window_steps.PlanTiming, "add", lambda self, seconds: times.append(seconds))
    clock = Clock()
    monkeypatch.setattr(window_steps.time, "perf_counter", lambda: clock.now)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if model.training:
            clock.now += 3.0 * int((batch != sequences.PADDING).sum())
        return sequences.token_loss(model, batch)

    longer = [length + 1 for length in LENGTHS]  # of one token alone there is no loss to take
    changes = {"loss": loss, "train_data": lambda: sequences.Sequences(longer)}
    drive_sequences(tmp_path, limit=2, changes=changes, effective_batch_size=4, epochs=14)
    assert times == [3.0] * 9 * 14  # an epoch's first window waits for the loader


@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_a_single_worker_has_nothing_to_share(tmp_path: Path, sharding: str) -> None:
    options: dict[str, Any] = {"effective_batch_size": 10, "epochs": 2}
    plain = drive(make_task(), tmp_path / "plain", **options)
    driven = drive(make_task(), tmp_path / "sharded", sharding=sharding, **options)
    assert all(torch.equal(driven.weights[name], weight) for name, weight in plain.weights.items())


class Augmented(Dataset[Any]):
    """Samples in float64, augmented from all three generators."""

    def __init__(self) -> None:
        self._data = make_data(37)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        features, label = self._data[index]
        return features + torch.rand(6) + random.random() + float(np.random.random()), label


class Alarm:
    """Tells a training to end while it computes its n-th loss, counted from 1, evaluation included."""

    def __init__(self, due_at: int | None = None) -> None:
        self.num_losses = 0
        self.termination = Termination(30.0)
        self._due_at = due_at

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.num_losses += 1
        self.termination.is_due |= self.num_losses == self._due_at
        return cross_entropy(model, batch)

    def task(self, **changes: Any) -> Task:
        """A task with everything that has a state: BatchNorm, dropout, a schedule, augmentation, metrics."""
        return make_metric_task(
            **{
                "model": lambda: nn.Sequential(
                    nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)
                ).double(),
                "loss": self.loss,
                "optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
                "scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
                "train_data": Augmented,
                **changes,
            }
        )


ENDED: dict[str, Any] = {"effective_batch_size": 10, "limit": 4, "metric": "val_loss"}
"""An epoch is three windows of three losses, one of two, and three of evaluation: 14 losses."""

ENDED_BUDGETS: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 2, "clip_norm": 0.5, "warmup_steps": 3},
    "steps inside an epoch": {"epochs": None, "num_steps": 6, "noise_scale": True},
    "samples inside an epoch": {"epochs": None, "num_samples": 53, "clip_norm": 0.1},
    "patience": {"epochs": 9, "patience": 1},
}


def train_in_parts(folder: Path, due_at: list[int], **options: Any) -> tuple[list[Driven], int]:
    """Train, tell it to end at those losses of its, and go on from what it stored, until it is done.

    Return the parts, and how many losses the last one computed.
    """
    parts: list[Driven] = []
    checkpoint: Path | None = None
    for number, loss in enumerate([*due_at, None]):
        torch.rand(number)  # a new process has another random state
        alarm = Alarm(loss)
        part = drive(
            alarm.task(**options.get("changes", {})),
            folder / f"part_{number}",
            checkpoint=checkpoint,
            termination=alarm.termination,
            **{name: value for name, value in options.items() if name != "changes"},
        )
        parts.append(part)
        if not part.was_ended:
            break
        checkpoint = folder / f"newest_{number}.pt"
        assert CheckpointStore(str(folder / f"part_{number}/store")).fetch_newest(checkpoint)
    return parts, alarm.num_losses


@pytest.fixture
def frozen() -> Iterator[None]:
    """Garbage collections that do not look through what was imported, as in a trial's process."""
    gc.freeze()
    yield
    gc.unfreeze()


UNTIMED = (
    "epoch", "train_loss", "val_loss", "val_accuracy", "optimizer_steps", "num_samples", "learning_rate",
    "gradient_noise_scale",
)  # fmt: skip


def assert_undisturbed(parts: list[Driven], whole: Driven) -> None:
    """What the parts reported, and the last one's weights, are to the last bit those of `whole`."""
    reports = {report.metrics["epoch"]: report for part in parts for report in part.reports}
    assert list(reports) == [report.metrics["epoch"] for report in whole.reports]
    for report, expected in zip(reports.values(), whole.reports, strict=True):
        assert (report.is_final, report.reason) == (expected.is_final, expected.reason)
        for name in set(UNTIMED) & (expected.metrics.keys() | report.metrics.keys()):
            assert report.metrics[name] == expected.metrics[name], name
    last = next(part for part in reversed(parts) if part.checkpoints)
    states = [torch.load(driven.checkpoints[-1], weights_only=True) for driven in (last, whole)]
    for state in states:
        del state["metrics"], state["random_state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("budget", ENDED_BUDGETS.values(), ids=ENDED_BUDGETS)
def test_a_training_told_to_end_at_any_moment_goes_on_as_if_undisturbed(
    tmp_path: Path, budget: dict[str, Any]
) -> None:
    (whole,), num_losses = train_in_parts(tmp_path / "whole", [], **ENDED, **budget)
    for due_at in range(1, num_losses + 1):
        parts, _ = train_in_parts(tmp_path / str(due_at), [due_at], **ENDED, **budget)
        assert [part.was_ended for part in parts] == [True, False], due_at
        assert_undisturbed(parts, whole)


@pytest.mark.usefixtures("frozen")
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(due_at=st.lists(st.integers(3, 8), min_size=12, max_size=12))
def test_a_training_told_to_end_again_and_again_goes_on_as_if_undisturbed(
    tmp_path_factory: pytest.TempPathFactory, due_at: list[int]
) -> None:
    """Every part is long enough for one window."""
    folder, budget = tmp_path_factory.mktemp("ended"), ENDED_BUDGETS["epochs"]
    (whole,), _ = train_in_parts(folder / "whole", [], **ENDED, **budget)
    parts, _ = train_in_parts(folder / "parts", due_at, **ENDED, **budget)
    assert len(parts) > 3
    assert_undisturbed(parts, whole)


def test_a_training_told_to_end_takes_no_further_step_and_reports_nothing(tmp_path: Path) -> None:
    """In the second window's second micro-batch of three; what it had of that window is given up."""
    (part, *_), _ = train_in_parts(tmp_path, [5], **ENDED, epochs=2)
    assert part.was_ended
    assert part.reports == []
    state = torch.load(tmp_path / "newest_0.pt", weights_only=True)
    assert (state["num_steps"], state["part"]["num_windows"], state["part"]["num_samples"]) == (1, 1, 10)
    assert state["progress"]["epoch"] == 0


def test_one_that_has_just_ended_an_epoch_reports_it_first(tmp_path: Path) -> None:
    """At the last loss of its evaluation."""
    (part, *_), _ = train_in_parts(tmp_path, [14], **ENDED, epochs=2)
    assert part.was_ended
    assert [report.metrics["epoch"] for report in part.reports] == [1]
    assert torch.load(tmp_path / "newest_0.pt", weights_only=True)["part"] is None


@pytest.mark.parametrize("due_at", [2, 9])
def test_sequences_grouped_by_length_go_on_where_they_were(tmp_path: Path, due_at: int) -> None:
    def one(folder: Path, due_at: int | None, checkpoint: Path | None = None) -> Driven:
        alarm = Alarm(due_at)

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            alarm.num_losses += 1
            alarm.termination.is_due |= alarm.num_losses == due_at
            return sequences.token_loss(model, batch)

        return drive_sequences(
            folder, changes={"loss": loss}, checkpoint=checkpoint, termination=alarm.termination
        )

    whole, ended = one(tmp_path / "whole", None), one(tmp_path / "ended", due_at)
    assert ended.was_ended
    resumed = one(tmp_path / "resumed", None, tmp_path / "ended/store/checkpoint_at_sigterm/checkpoint.pt")
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, whole.weights[name]), name
    for name in ("train_loss", "val_loss", "padding_share", "num_samples"):
        assert resumed.reports[0].metrics[name] == whole.reports[0].metrics[name], name


def test_rescues_of_an_epoch_that_was_cut_short_are_counted(tmp_path: Path) -> None:
    alarm, faults = Alarm(7), Faults(("forward", 2))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        faults.reach("forward")
        return alarm.loss(model, batch)

    drive(alarm.task(loss=loss), tmp_path / "ended", termination=alarm.termination, **ENDED)
    assert faults.left == []
    checkpoint = tmp_path / "ended/store/checkpoint_at_sigterm/checkpoint.pt"
    resumed = drive(Alarm().task(), tmp_path / "resumed", checkpoint=checkpoint, **ENDED)
    assert [report.metrics["num_rescues"] for report in resumed.reports] == [1, 1]


def test_a_checkpoint_that_cannot_be_written_costs_the_checkpoint_alone(tmp_path: Path) -> None:
    """A folder stands where its file is to be."""
    (tmp_path / "checkpoint.pt").mkdir()
    driven = drive(make_task(), tmp_path, epochs=2)
    assert [report.checkpoint_path for report in driven.reports] == [None, None]
    assert all("cannot write" in report.checkpoint_error for report in driven.reports)
    assert driven.last["epoch"] == 2
