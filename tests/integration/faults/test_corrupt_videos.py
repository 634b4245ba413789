"""Video files that are broken in the middle, where only decoding them shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tune_easytrain as te

av = pytest.importorskip("av")

NUM_FILES = 8


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Videos of noise, one of which breaks off."""
    folder = tmp_path / "videos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(NUM_FILES):
        with av.open(str(folder / f"v_{number}.avi"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = 32
            for _ in range(8):
                picture = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    broken = folder / "v_3.avi"
    content = bytearray(broken.read_bytes())
    content[len(content) // 4 :] = bytes(len(content) - len(content) // 4)
    broken.write_bytes(content)
    return folder


def test_a_corrupt_video_is_passed_over_and_too_many_are_told_by_name(
    videos: Path, tmp_path: Path, local_ray: None
) -> None:
    sweep = {
        "name": "videos",
        "task": f"{Path(__file__).with_name('video_task.py')}:build_task",
        "config": {"folder": str(videos), "model": {"type": "linear"}},
        "grid_search": {"grid": {"max_corrupt_share": [0.5, 0.01], "train.loader_workers": [0, 2]}},
        "batch": {"effective_batch_size": 4, "memory_budget": "512MiB", "probe": "off"},
        "train": {"epochs": 2},
        "run": {"metric": "train_loss", "mode": "min", "storage": str(tmp_path / "runs")},
    }
    frame = te.run(sweep, quiet=True).frame()
    assert list(frame["state"]) == ["finished", "finished", "failed", "failed"]
    assert list(frame["num_failures"]) == [0, 0, 0, 0]
    tolerated, strict = frame.iloc[:2], frame.iloc[2:]
    assert set(tolerated["num_samples"]) <= {2 * NUM_FILES, 2 * (NUM_FILES - 1)}
    assert tolerated["train_loss_last"].nunique() == 1
    for error in strict["error"]:
        assert "DataError" in error
        assert "1 of 8 videos" in error
