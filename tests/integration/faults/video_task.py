"""A task on a folder of video files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tune_easytrain import Task
from tune_easytrain.video_clips import VideoClips


def build_task(config: dict[str, Any]) -> Task:
    """A linear classifier of clips of two frames; `folder`, and `max_corrupt_share` of its files."""
    paths = sorted(Path(config["folder"]).iterdir())

    def data() -> VideoClips:
        return VideoClips(
            [(path, index % 2) for index, path in enumerate(paths)],
            lambda clip: clip.double().flatten() / 255,
            num_frames=2,
            max_corrupt_share=config["max_corrupt_share"],
        )

    return Task(
        model=lambda: nn.Linear(2 * 3 * 32 * 32, 2).double(),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=data,
    )
