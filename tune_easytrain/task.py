"""`Task`: what a sweep trains. The model, data, loss and optimizer of one config, all built lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tune_easytrain.errors import TaskError

if TYPE_CHECKING:
    import torchmetrics
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

Batch: TypeAlias = Any
"""What the data loader yields for one micro-batch: tensors in any nesting of tuples, lists and dicts."""


def _no_optimizer(model: nn.Module) -> Optimizer:
    raise TaskError(
        "the task has no optimizer: give it one, or write train.function: none to evaluate without training"
    )


def _no_train_data() -> Dataset[Any]:
    raise TaskError(
        "the task has no train_data: give it some, or write train.function: none to evaluate without training"
    )


@dataclass(kw_only=True)
class Task:
    """One config's model, data, loss and optimizer, as `build_task(config)` returns it.

    Nothing heavy happens until a function is called: the probe builds its own model, `validate` builds
    models without storage, and the data set is opened only where it is read.
    """

    model: Callable[[], nn.Module]
    """Builds the model, on the CPU, in training mode."""

    loss: Callable[[nn.Module, Batch], Tensor]
    """Scalar loss of one batch: the mean over its samples (or over what `weight` counts)."""

    optimizer: Callable[[nn.Module], Optimizer] = _no_optimizer
    """Builds the optimizer over the model's parameters; not needed where nothing is trained."""

    train_data: Callable[[], Dataset[Any]] = _no_train_data
    """Opens the training set: map-style, with a length; not needed where nothing is trained."""

    val_data: Callable[[], Dataset[Any]] | None = None
    """Opens the validation set, or None where there is none."""

    predict: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] | None = None
    """`(prediction, target)` of one batch for the metrics; needed when there are metrics."""

    metrics: Mapping[str, Callable[[], torchmetrics.Metric]] = field(default_factory=dict)
    """Metrics by name; `accuracy` is reported as `val_accuracy`."""

    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    """Builds the learning-rate scheduler, which is stepped once per optimizer step."""

    collate: Callable[[list[Any]], Batch] | None = None
    """Samples to a batch; default: torch's `default_collate`."""

    split: Callable[[Batch, Sequence[int]], Iterable[Batch]] | None = None
    """A batch to batches of the given sizes; default: along dimension 0 of every tensor."""

    weight: Callable[[Batch], int] | None = None
    """How many things the mean loss of a batch averages over; default: its samples."""

    lengths: Callable[[Dataset[Any]], Sequence[int]] | None = None
    """The length of every sample of a data set in tokens, without reading the samples: micro-batches are then
    made of samples of like length. For tasks whose `collate` pads samples to the longest of a batch."""

    worst_case: Callable[[int], Batch] | None = None
    """The batch of `m` samples that needs the most memory; default: the longest training sample by
    `lengths`, else the largest of the first eight, repeated."""

    generate: Callable[[nn.Module, Batch], Any] | None = None
    """Generation, where the task does it; the probe runs it too."""

    couples_samples: bool | int = False
    """Whether the samples of a batch depend on one another beyond BatchNorm, as in a contrastive loss; then
    gradients cannot be accumulated exactly, and the trial says so. A number, such as 8: only those of so many
    consecutive samples do (the first eight, the next eight, …), and micro-batches keep them together."""

    @property
    def group_size(self) -> int:
        """Consecutive samples that a micro-batch keeps together; 1 where they need not be."""
        return max(1, int(self.couples_samples))

    @property
    def is_trained(self) -> bool:
        """Whether it has an optimizer; without one it is only evaluated."""
        return self.optimizer is not _no_optimizer

    def only_evaluated(self) -> Task:
        """Return the task without training: no optimizer, and the validation set wherever data is needed.

        Raises TaskError where there is no validation set.
        """
        if self.val_data is None:
            raise TaskError("the task has no val_data, so there is nothing to evaluate it on")
        return replace(self, optimizer=_no_optimizer, train_data=self.val_data)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that are reported, unless a training function of the user's own reports others."""
        trained = ("train_loss",) if self.is_trained else ()
        if self.val_data is None:
            return trained
        return (*trained, "val_loss", *(f"val_{name}" for name in self.metrics))


BuildTask: TypeAlias = Callable[[dict[str, Any]], Task]
