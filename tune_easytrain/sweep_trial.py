"""A trial as Ray Tune runs it: an actor that keeps its forkserver from trial to trial. No torch."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.exceptions import RayError

from tune_easytrain.child_process import start_forkserver
from tune_easytrain.cluster import trials_per_node
from tune_easytrain.errors import WorkerLostError
from tune_easytrain.function_child import FunctionChild
from tune_easytrain.protocol import Opening, Report
from tune_easytrain.ray_snapshot import StoredCheckpoints
from tune_easytrain.run_directory import trial_id
from tune_easytrain.settings import TrialSettings
from tune_easytrain.shared_probe_cache import SharedProbeCache
from tune_easytrain.sweep_hub import EventSender
from tune_easytrain.trial import TrialSpec, run_trial
from tune_easytrain.trial_children import TrialProcesses
from tune_easytrain.trial_space import TrialSpace
from tune_easytrain.worker_actor import WorkerActors
from tune_easytrain.workers import WorkerProcesses

TRAINING_ENDED = "training_ended"
"""What Ray's last result of a trial holds besides its metrics, unless the trial failed or was stopped."""

TIME = "epoch"
"""What schedulers go by: the metric that counts a trial's reports."""

CHECKPOINT_NAME = "checkpoint.pt"
"""The file in each of the folders that Ray stores as a checkpoint."""

_WRITER_NAME = "written_by"
"""The file beside a stored checkpoint with the id of its trial; a scheduler may hand it to another one."""


@dataclass(frozen=True)
class SweepShared:
    """What all trials of a sweep have in common.

    `num_workers` is how many workers the sweep file gives a trial; one that fits on no GPU may have got more,
    to share out its model.
    `ended` holds, for a resumed sweep, the last metrics of every trial that had already ended;
    `hub` is the handle of the sweep's `SweepHub`.
    Of trials that have begun, but not as far as Ray knows, `begun` holds the configs, with the values drawn
    for them, and `checkpoints` the files.
    """

    sweep_name: str
    space: TrialSpace
    task_payload: bytes | None
    function_payload: bytes | None
    num_workers: int
    metric: str
    mode: Literal["min", "max"]
    hub: Any
    ended: Mapping[str, Mapping[str, float]]
    begun: Mapping[str, dict[str, Any]]
    checkpoints: StoredCheckpoints
    preloaded_modules: tuple[str, ...]


class SweepTrial(tune.Trainable):
    """Runs one trial after another; each step is one report of the trial's training function."""

    def setup(self, config: dict[str, Any], shared: SweepShared | None = None) -> None:
        """Get ready for the first trial; nothing of it is started before the first step."""
        assert shared is not None
        self._shared = shared
        self._dir = Path(tempfile.mkdtemp(prefix="tune_easytrain_trial_"))
        self._reports: Iterator[Report] | None = None
        self._last_metrics: dict[str, float] = {}
        # Ray gives a reused actor only trials that ask for the same.
        resources = self.trial_resources
        assert resources is not None, "Ray Tune tells a trial what it has set aside for it"
        self._bundles: list[dict[str, float]] = resources.bundles
        bundle = self._bundles[0]
        self._actors = WorkerActors(len(self._bundles), bundle, shared.preloaded_modules)
        self._function_child = FunctionChild(shared.preloaded_modules)
        if len(self._bundles) == 1:
            start_forkserver(shared.preloaded_modules)
        node_id = ray.get_runtime_context().get_node_id()
        self._share = min(1.0, bundle.get("GPU", 0.0)) or 1.0 / trials_per_node(bundle, node_id)
        self._events = EventSender(shared.hub)
        self._first_name = self.trial_name
        self._set_trial(config)

    def __repr__(self) -> str:
        """Return what Ray's dashboard calls this actor; it asks once, before the first of its trials."""
        return f"{self._shared.sweep_name}: {self._first_name} and later trials"

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over the next trial."""
        self._end_trial()
        self._checkpoint.unlink(missing_ok=True)
        self._last_metrics = {}
        self._set_trial(new_config)
        return True

    def _set_trial(self, config: dict[str, Any]) -> None:
        self._config = config
        self._known_config: dict[str, Any] | None = None
        self._is_resumed = False
        self._writer = self._cloned_from = ""

    @property
    def _checkpoint(self) -> Path:
        return self._dir / CHECKPOINT_NAME

    def step(self) -> dict[str, Any]:
        """Wait for the next report of the trial's child process and hand it to Ray.

        A trial whose own code fails ends here like one that is done, which its events tell apart: to Ray a
        failure is one of the actor, which would end with it, and take what it has imported along.
        """
        name = self.trial_name
        if name in self._shared.ended:  # Ray's own record of it was older than ours
            return self._end_result(self._shared.ended[name])
        if self._reports is None:
            if not self._is_resumed and name in self._shared.begun:
                self._known_config = self._shared.begun[name]
                self._is_resumed = self._shared.checkpoints.fetch(name, self._checkpoint)
                self._writer = name
            self._reports = self._run()
        try:
            report = next(self._reports, None)
        except (RayError, WorkerLostError):  # this actor cannot go on to another trial either
            self._events.settle()
            raise
        except Exception:  # noqa: BLE001 -- told in the trial's events, with its traceback
            self._reports = None
            self._events.settle()
            return self._end_result({**self._last_metrics, self._shared.metric: float("nan")})
        if report is None:
            return self._end_result(self._last_metrics) | {TRAINING_ENDED: True}
        self._last_metrics = report.metrics
        has_checkpoint = report.checkpoint_path is not None
        if report.checkpoint_path is not None:
            shutil.move(report.checkpoint_path, self._checkpoint)
            self._writer = self.trial_name
        result = {**report.metrics, "done": report.is_final, "should_checkpoint": has_checkpoint}
        if report.is_final:
            self._end_trial()
            return {**result, TRAINING_ENDED: True}
        self._events.settle()  # a scheduler may end the trial now, and Ray this process
        return result

    def _end_result(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return a result that ends the trial, with what schedulers read from every one."""
        return {TIME: 0, self._shared.metric: float("nan"), **metrics, "done": True}

    def _run(self) -> Iterator[Report]:
        name, spec = self.trial_name, self._spec()
        cache = SharedProbeCache(
            self._shared.hub, name, attempt_timeout_seconds=spec.settings.probe_timeout_seconds
        )
        return run_trial(spec, partial(self._events.send, name), cache, self._processes(spec))

    def _processes(self, spec: TrialSpec) -> Callable[[Opening], TrialProcesses] | None:
        """Return what starts the trial's processes; None: children of this one, ended with the trial."""
        if len(self._bundles) > 1:
            return lambda opening: WorkerProcesses(opening, self._actors)
        if spec.task_payload is None and spec.device == "cpu":
            return self._function_child.begin
        return None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the trial's last checkpoint to where Ray stores it."""
        if self._checkpoint.is_file():
            shutil.copy2(self._checkpoint, Path(checkpoint_dir) / CHECKPOINT_NAME)
            (Path(checkpoint_dir) / _WRITER_NAME).write_text(self._writer)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take a checkpoint that Ray stored, of this trial or of a better one; the child goes on from it."""
        stored = Path(checkpoint) / CHECKPOINT_NAME
        if stored.is_file():
            shutil.copy2(stored, self._checkpoint)
            self._is_resumed = True
            self._writer = (Path(checkpoint) / _WRITER_NAME).read_text()
            self._cloned_from = "" if self._writer == self.trial_name else self._writer

    def cleanup(self) -> None:
        """End the child and remove what is local."""
        self._end_trial()
        with contextlib.suppress(RayError):  # the sweep may be over
            self._events.settle()
        self._actors.kill()
        self._function_child.kill()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _end_trial(self) -> None:
        if self._reports is not None:
            self._reports.close()  # type: ignore[attr-defined]  # a generator
            self._reports = None

    def _spec(self) -> TrialSpec:
        shared = self._shared
        config = copy.deepcopy(self._known_config) or shared.space.config_from_ray(self._config)
        bundle, num_workers = self._bundles[0], len(self._bundles)
        if num_workers > shared.num_workers:
            config["memory"]["sharding"] = "full"
        return TrialSpec(
            config=config,
            settings=TrialSettings.from_config(
                config, metric=shared.metric, mode=shared.mode, num_workers=num_workers
            ),
            task_payload=shared.task_payload,
            function_payload=shared.function_payload,
            device="cuda" if bundle.get("GPU") else "cpu",
            device_share=self._share,
            num_threads=max(1, int(bundle.get("CPU", 1.0))),
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
