"""What the loader costs on top of decoding: clips per second that reach an empty training step.

    apt-get source --download-only pytorch-vision && tar xf pytorch-vision_*.orig.tar.gz
    python benchmarks/video_loading.py vision-*/test/assets/videos/v_*.avi [--json video_loading.json]

The clips of that Debian source package are UCF101's own, XviD of 320 x 240. A loop that does nothing reads
an epoch of them through `EpochLoader` with `--num-processes` loader processes, which have read an epoch
before. As many processes with nothing between them and the same clips say what can be had: `decode_clip`
alone, or the data set with a model's transform. Both sides take turns; the figures are medians over rounds.
With `--decoders pyav torchcodec` every row is measured with each (docs/tasks.md tells what torchcodec needs).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import av
import torch
from torch import nn
from torchvision.transforms._presets import VideoClassification

import tune_easytrain as te
from tune_easytrain import torchcodec_decoder, video
from tune_easytrain.loader import EpochLoader, epoch_order, prepare_loader_process
from tune_easytrain.video_clips import DECODERS, VideoClips

NUM_FRAMES = 16
EFFECTIVE_BATCH_SIZE, MICROBATCH_SIZE = 64, 8


def as_decoded(clip: torch.Tensor) -> torch.Tensor:
    """Return the clip as the decoder lays it out: uint8 of shape (16, 240, 320, 3)."""
    return clip.permute(0, 2, 3, 1)


TRANSFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": as_decoded,
    "r3d_18": VideoClassification(crop_size=(112, 112), resize_size=(128, 171)),
}


def read_processes(read: Callable[[int], Any], num_clips: int, num_processes: int) -> float:
    """Return the clips per second that processes get when each reads its share and throws it away."""
    context = multiprocessing.get_context("fork")
    order = epoch_order(num_clips, 0, 0)
    barrier = context.Barrier(num_processes + 1)

    def work(share: Sequence[int]) -> None:
        torch.set_num_threads(1)
        prepare_loader_process(0)  # the same malloc on both sides
        read(share[0])
        barrier.wait()
        for index in share:
            read(index)

    processes = [
        context.Process(target=work, args=(order[rank::num_processes],)) for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return num_clips / (time.perf_counter() - start)


def make_loader(clips: VideoClips, num_processes: int) -> EpochLoader:
    """Return the loader under test; its processes start with the first epoch."""
    task = te.Task(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: batch[0].float().mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters()),
        train_data=lambda: clips,
    )
    return EpochLoader(task, clips, torch.device("cpu"), seed=0, num_workers=num_processes)


def read_epoch(loader: EpochLoader) -> tuple[float, float]:
    """Return the clips per second of one epoch, and the share of it spent waiting."""
    plan = te.BatchPlan.build(EFFECTIVE_BATCH_SIZE, MICROBATCH_SIZE)
    num_clips = 0
    start = time.perf_counter()
    windows = loader.windows(EFFECTIVE_BATCH_SIZE, 0)
    for index in range(len(windows)):
        for _, labels in windows.read(index, plan):
            num_clips += len(labels)
    seconds = time.perf_counter() - start
    assert num_clips == loader.num_samples
    return num_clips / seconds, windows.wait_seconds / seconds


def measure(
    files: Sequence[Path], sampling: str, transform: str, decoder: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return one row: both sides' clips per second, and the median of the rounds' ratios."""
    num_clips, num_processes = arguments.num_clips, arguments.num_processes
    samples: list[tuple[str | Path, int]] = [(files[i % len(files)], 0) for i in range(num_clips)]
    clips = VideoClips(
        samples, TRANSFORMS[transform], num_frames=NUM_FRAMES, sampling=sampling, decoder=decoder
    )
    decode_clip = torchcodec_decoder.decode_clip if decoder == "torchcodec" else video.decode_clip

    def decode(index: int) -> Any:
        return decode_clip(samples[index][0], NUM_FRAMES, sampling)

    read = decode if transform == "none" else clips.__getitem__
    loader = make_loader(clips, num_processes)
    read_epoch(loader)
    in_loop, alone = [], []
    for number in range(arguments.rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            if side:
                in_loop.append(read_epoch(loader)[0])
            else:
                alone.append(read_processes(read, num_clips, num_processes))
    return {
        "sampling": sampling,
        "transform": transform,
        "decoder": decoder,
        "alone_clips_per_second": round(statistics.median(alone), 1),
        "in_loop_clips_per_second": round(statistics.median(in_loop), 1),
        "share": round(statistics.median(map(truediv, in_loop, alone)), 3),
        "alone_rounds": [round(rate, 1) for rate in alone],
        "in_loop_rounds": [round(rate, 1) for rate in in_loop],
    }


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", type=Path, nargs="+", help="video files of one size")
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--num-clips", type=int, default=640, help="clips of one epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=["pyav"])
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    rows = [
        measure(arguments.clips, sampling, transform, decoder, arguments)
        for transform in TRANSFORMS
        for sampling in ("uniform", "consecutive")
        for decoder in arguments.decoders
    ]
    names = f"{'sampling':12} {'transform':10} {'decoder':11}"
    print(f"{names} {'alone (clips/s)':>16} {'in the loop':>12} {'share':>7}")
    for row in rows:
        print(
            f"{row['sampling']:12} {row['transform']:10} {row['decoder']:11} "
            f"{row['alone_clips_per_second']:16.1f} "
            f"{row['in_loop_clips_per_second']:12.1f} {row['share']:7.1%}"
        )
    if arguments.json is not None:
        machine = {"num_cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
        versions = {"av": av.__version__, "torch": torch.__version__}
        if "torchcodec" in arguments.decoders:
            versions["torchcodec"] = importlib.metadata.version("torchcodec")
        setup = {
            "clips": sorted(file.name for file in arguments.clips),
            "num_processes": arguments.num_processes,
            "num_clips": arguments.num_clips,
            "num_frames": NUM_FRAMES,
            "microbatch_size": MICROBATCH_SIZE,
        }
        table = {"machine": machine, "versions": versions, "setup": setup, "rows": rows}
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
