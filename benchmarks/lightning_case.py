"""Lightning's batch size finder on one of our tasks, for `find_microbatch.py`."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader

NUM_SAMPLES = 10**6


class Module(lightning.LightningModule):
    """The task's model, loss and optimizer."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self._task = task
        self.model = task.model()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Return the loss of one batch."""
        loss: torch.Tensor = self._task.loss(self.model, batch)
        return loss

    def configure_optimizers(self) -> Any:
        """Build the task's optimizer."""
        return self._task.optimizer(self.model)


class Data(lightning.LightningDataModule):
    """Batches of the right shape that cost the host nothing: their memory is not even written to."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.batch_size = 2
        self.sizes: list[int] = []
        with torch.device("meta"):
            self._example = task.worst_case(1)

    def train_dataloader(self) -> Any:
        """Return a loader for the batch size being tried."""
        if not self.sizes or self.sizes[-1] != self.batch_size:
            self.sizes.append(self.batch_size)
        return DataLoader(range(NUM_SAMPLES), batch_size=self.batch_size, collate_fn=self._collate)

    def _collate(self, indices: list[int]) -> Any:
        clips, labels = self._example
        return torch.empty(len(indices), *clips.shape[1:]), torch.zeros(len(indices), dtype=labels.dtype)


def scale_batch_size(task: Any, precision: str, mode: str) -> tuple[int, list[int]]:
    """Return the size found with the Tuner's defaults, and every size tried."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    trainer = lightning.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    )
    data = Data(task)
    found = Tuner(trainer).scale_batch_size(Module(task), datamodule=data, mode=mode)
    return int(found or data.batch_size), data.sizes
