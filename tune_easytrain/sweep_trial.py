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
from tune_easytrain.protocol import Report
from tune_easytrain.run_directory import trial_id
from tune_easytrain.settings import TrialSettings
from tune_easytrain.shared_probe_cache import SharedProbeCache
from tune_easytrain.trial import TrialSpec, run_trial
from tune_easytrain.trial_space import TrialSpace

_CHECKPOINT_NAME = "checkpoint.pt"


@dataclass(frozen=True)
class SweepShared:
    """What all trials of a sweep have in common.

    `ended` holds, for a resumed sweep, the last metrics of every trial that had already ended;
    `probe_cache` is the handle of the actor that knows what the trials have measured.
    """

    space: TrialSpace
    task_payload: bytes | None
    function_payload: bytes | None
    resources: Mapping[str, float]
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

    @property
    def _checkpoint(self) -> Path:
        return self._dir / _CHECKPOINT_NAME

    def step(self) -> dict[str, Any]:
        """Wait for the next report of the trial's child process and hand it to Ray."""
        name = readable_id(self.trial_id)
        if name in self._shared.ended:  # Ray's own record of it was older than ours
            return {self._shared.metric: float("nan"), **self._shared.ended[name], "done": True}
        if self._reports is None:
            spec = self._spec()
            cache = SharedProbeCache(
                self._shared.probe_cache, name, attempt_timeout_seconds=spec.settings.probe_timeout_seconds
            )
            self._reports = run_trial(spec, lambda event: self._emit(name, event), cache)
        report = next(self._reports, None)
        if report is None:
            if self._shared.metric not in self._last_metrics:
                return {self._shared.metric: float("nan"), "done": True}
            return {**self._last_metrics, "done": True}
        self._last_metrics = report.metrics
        has_checkpoint = report.checkpoint_path is not None
        if report.checkpoint_path is not None:
            shutil.move(report.checkpoint_path, self._checkpoint)
        if report.is_final:
            self._end_trial()
        return {**report.metrics, "done": report.is_final, "should_checkpoint": has_checkpoint}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the trial's last checkpoint to where Ray stores it."""
        if self._checkpoint.is_file():
            shutil.copy2(self._checkpoint, Path(checkpoint_dir) / _CHECKPOINT_NAME)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take the checkpoint that Ray stored for this trial; the child goes on from it."""
        stored = Path(checkpoint) / _CHECKPOINT_NAME
        if stored.is_file():
            shutil.copy2(stored, self._checkpoint)
            self._is_resumed = True

    def cleanup(self) -> None:
        """End the child and remove what is local."""
        self._end_trial()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _end_trial(self) -> None:
        if self._reports is not None:
            self._reports.close()  # type: ignore[attr-defined]  # a generator
            self._reports = None

    def _emit(self, name: str, event: Event) -> None:
        self._shared.events.put((name, event))

    def _spec(self) -> TrialSpec:
        shared = self._shared
        config = shared.space.config_from_ray(self._config)
        gpu, cpu = shared.resources.get("GPU", 0.0), shared.resources.get("CPU", 1.0)
        node_id = ray.get_runtime_context().get_node_id()
        share = min(1.0, gpu) if gpu else 1.0 / trials_per_node(shared.resources, node_id)
        return TrialSpec(
            config=config,
            settings=TrialSettings.from_config(config, metric=shared.metric, mode=shared.mode),
            task_payload=shared.task_payload,
            function_payload=shared.function_payload,
            device="cuda" if gpu else "cpu",
            device_share=share,
            num_threads=max(1, int(cpu)),
            checkpoint_path=str(self._checkpoint) if self._is_resumed else None,
            preloaded_modules=shared.preloaded_modules,
        )


def readable_id(ray_trial_id: str) -> str:
    """Return our id of a trial from Ray's, which ends in the trial's number in the sweep."""
    return trial_id(int(ray_trial_id.rsplit("_", 1)[-1]))
