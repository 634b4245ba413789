"""A trial as Ray Tune runs it: an actor that keeps its forkserver from trial to trial. No torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.util.queue import Queue

from tune_easytrain.cluster import trials_per_node
from tune_easytrain.events import Event
from tune_easytrain.protocol import Opening, Report
from tune_easytrain.run_directory import trial_id
from tune_easytrain.settings import TrialSettings
from tune_easytrain.shared_probe_cache import SharedProbeCache
from tune_easytrain.trial import TrialSpec, run_trial
from tune_easytrain.trial_space import TrialSpace
from tune_easytrain.worker_actor import WorkerActors
from tune_easytrain.workers import WorkerProcesses

_CHECKPOINT_NAME = "checkpoint.pt"
_WRITER_NAME = "written_by"
"""The file beside a stored checkpoint with the id of its trial; a scheduler may hand it to another one."""


@dataclass(frozen=True)
class SweepShared:
    """What all trials of a sweep have in common.

    `num_workers` is how many workers the sweep file gives a trial; one that fits on no GPU may have got more,
    to share out its model.
    `ended` holds, for a resumed sweep, the last metrics of every trial that had already ended;
    `probe_cache` is the handle of the actor that knows what the trials have measured.
    """

    space: TrialSpace
    task_payload: bytes | None
    function_payload: bytes | None
    num_workers: int
    metric: str
    mode: Literal["min", "max"]
    events: Queue
    probe_cache: Any
    ended: Mapping[str, Mapping[str, float]]
    preloaded_modules: tuple[str, ...]


class SweepTrial(tune.Trainable):
    """Runs one trial after another; each step is one report of the trial's training function."""

    def setup(self, config: dict[str, Any], shared: SweepShared | None = None) -> None:
        """Get ready for the first trial; nothing is started before the first step."""
        assert shared is not None
        self._shared = shared
        self._dir = Path(tempfile.mkdtemp(prefix="tune_easytrain_trial_"))
        self._reports: Iterator[Report] | None = None
        self._last_metrics: dict[str, float] = {}
        # Ray gives a reused actor only trials that ask for the same.
        resources = self.trial_resources
        assert resources is not None, "Ray Tune tells a trial what it has set aside for it"
        self._bundles: list[dict[str, float]] = resources.bundles
        self._actors = WorkerActors(len(self._bundles), self._bundles[0], shared.preloaded_modules)
        self._set_trial(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over the next trial."""
        self._end_trial()
        self._checkpoint.unlink(missing_ok=True)
        self._last_metrics = {}
        self._set_trial(new_config)
        return True

    def _set_trial(self, config: dict[str, Any]) -> None:
        self._config = config
        self._is_resumed = False
        self._writer = self._cloned_from = ""

    @property
    def _checkpoint(self) -> Path:
        return self._dir / _CHECKPOINT_NAME

    def step(self) -> dict[str, Any]:
        """Wait for the next report of the trial's child process and hand it to Ray."""
        name = self.trial_name
        if name in self._shared.ended:  # Ray's own record of it was older than ours
            return {self._shared.metric: float("nan"), **self._shared.ended[name], "done": True}
        if self._reports is None:
            spec = self._spec()
            cache = SharedProbeCache(
                self._shared.probe_cache, name, attempt_timeout_seconds=spec.settings.probe_timeout_seconds
            )
            self._reports = run_trial(
                spec,
                lambda event: self._emit(name, event),
                cache,
                None if len(self._bundles) == 1 else self._worker_processes,
            )
        report = next(self._reports, None)
        if report is None:
            if self._shared.metric not in self._last_metrics:
                return {self._shared.metric: float("nan"), "done": True}
            return {**self._last_metrics, "done": True}
        self._last_metrics = report.metrics
        has_checkpoint = report.checkpoint_path is not None
        if report.checkpoint_path is not None:
            shutil.move(report.checkpoint_path, self._checkpoint)
            self._writer = self.trial_name
        if report.is_final:
            self._end_trial()
        return {**report.metrics, "done": report.is_final, "should_checkpoint": has_checkpoint}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the trial's last checkpoint to where Ray stores it."""
        if self._checkpoint.is_file():
            shutil.copy2(self._checkpoint, Path(checkpoint_dir) / _CHECKPOINT_NAME)
            (Path(checkpoint_dir) / _WRITER_NAME).write_text(self._writer)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take a checkpoint that Ray stored, of this trial or of a better one; the child goes on from it."""
        stored = Path(checkpoint) / _CHECKPOINT_NAME
        if stored.is_file():
            shutil.copy2(stored, self._checkpoint)
            self._is_resumed = True
            self._writer = (Path(checkpoint) / _WRITER_NAME).read_text()
            self._cloned_from = "" if self._writer == self.trial_name else self._writer

    def cleanup(self) -> None:
        """End the child and remove what is local."""
        self._end_trial()
        self._actors.kill()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _worker_processes(self, opening: Opening) -> WorkerProcesses:
        return WorkerProcesses(opening, self._actors)

    def _end_trial(self) -> None:
        if self._reports is not None:
            self._reports.close()  # type: ignore[attr-defined]  # a generator
            self._reports = None

    def _emit(self, name: str, event: Event) -> None:
        self._shared.events.put((name, event))

    def _spec(self) -> TrialSpec:
        shared = self._shared
        config = shared.space.config_from_ray(self._config)
        bundle, num_workers = self._bundles[0], len(self._bundles)
        if num_workers > shared.num_workers:
            config["memory"]["sharding"] = "full"
        gpu, cpu = bundle.get("GPU", 0.0), bundle.get("CPU", 1.0)
        node_id = ray.get_runtime_context().get_node_id()
        share = min(1.0, gpu) if gpu else 1.0 / trials_per_node(bundle, node_id)
        return TrialSpec(
            config=config,
            settings=TrialSettings.from_config(
                config, metric=shared.metric, mode=shared.mode, num_workers=num_workers
            ),
            task_payload=shared.task_payload,
            function_payload=shared.function_payload,
            device="cuda" if gpu else "cpu",
            device_share=share,
            num_threads=max(1, int(cpu)),
            checkpoint_path=str(self._checkpoint) if self._is_resumed else None,
            preloaded_modules=shared.preloaded_modules,
            cloned_from=self._cloned_from,
        )


def trial_name(trial: Any) -> str:
    """Return our id of one of Ray's trials, by which Ray is to call it.

    It is the trial's number in the sweep. Ray's own id ends in that, save where a search algorithm chose the
    trial: then its tag begins with the number, counted from 1.
    """
    _, _, number = trial.trial_id.partition("_")
    return trial_id(int(number) if number else int(trial.experiment_tag.partition("_")[0]) - 1)
