"""A trial as Ray Tune runs it: an actor that keeps its forkserver from trial to trial. No torch."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.train._internal.session import _TrainingResult

from tune_easytrain.checkpoint_store import CHECKPOINT_NAME, CheckpointStore
from tune_easytrain.child_process import start_forkserver
from tune_easytrain.cluster import trials_per_node
from tune_easytrain.errors import ChildDiedError
from tune_easytrain.events import CheckpointLost, Event, Interrupted
from tune_easytrain.function_child import FunctionChild
from tune_easytrain.protocol import Opening, Report
from tune_easytrain.run_directory import trial_id
from tune_easytrain.scratch import ScratchFolder
from tune_easytrain.settings import TrialSettings
from tune_easytrain.shared_probe_cache import SharedProbeCache
from tune_easytrain.sweep_hub import EventSender
from tune_easytrain.sweep_shared import TIME, TRAINING_ENDED, SweepShared
from tune_easytrain.trial import TrialSpec, run_trial
from tune_easytrain.trial_children import TrialChildren, TrialProcesses
from tune_easytrain.worker_actor import WorkerActors
from tune_easytrain.workers import WorkerProcesses

_WRITER_NAME = "written_by"
"""The file beside a stored checkpoint with the id of its trial; a scheduler may hand it to another one."""

_STORAGE_PATIENCE_SECONDS = 60.0
"""How long a trial that begins, or has ended, waits for a storage that is not there."""

_STORAGE_PAUSE_SECONDS = 2.0


class SweepTrial(tune.Trainable):
    """Runs one trial after another; each step is one report of the trial's training function."""

    def setup(self, config: dict[str, Any], shared: SweepShared | None = None) -> None:
        """Get ready for the first trial; nothing of it is started before the first step."""
        assert shared is not None
        self._shared = shared
        os.umask(os.umask(0o022) | 0o022)  # what others could write `resume` would refuse
        self._scratch = ScratchFolder()
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
        self._processes: TrialProcesses | None = None
        self._set_trial(config)
        self._is_interrupted = False
        threading.Thread(target=self._wait_for_interruption, daemon=True).start()
        self._ray_on_sigterm = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _wait_for_interruption(self) -> None:
        """Tell the trial at hand to end when the sweep is interrupted."""
        with contextlib.suppress(RayError):  # the sweep is over
            ray.get(self._shared.hub.interruption.remote())
            self._is_interrupted = True
            if self._processes is not None:
                self._processes.terminate()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Give the trial its time before this process ends, as a machine that is taken back wants it to."""
        if self._processes is not None:
            self._processes.terminate(self._shared.grace_seconds)
        if callable(self._ray_on_sigterm):
            self._ray_on_sigterm(number, frame)
        raise SystemExit(128 + number)

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
        self._is_over = False
        self._is_resumed = False
        self._writer = self._cloned_from = ""

    @property
    def _checkpoint(self) -> Path:
        return self._scratch.path / CHECKPOINT_NAME

    def step(self) -> dict[str, Any]:
        """Wait for the next report of the trial's child process and hand it to Ray.

        A trial whose own code fails ends here like one that is done, which its events tell apart: to Ray a
        failure is one of the actor, which would end with it, and take what it has imported along.
        """
        name = self.trial_name
        if name in self._shared.ended:  # Ray's own record of it was older than ours
            return self._end_result(self._seen_by_ray(self._shared.ended[name]))
        if self._is_interrupted:
            return self._wait_for_end()
        if self._reports is None:
            self._take_newest_checkpoint()
            self._reports = self._run()
        try:
            report = next(self._reports, None)
        except (RayError, ChildDiedError):  # no fault of the trial's own: Ray has it tried again
            self._reports = None
            self._events.settle()
            if self._is_interrupted:
                return self._wait_for_end()
            raise
        except Exception:  # noqa: BLE001 -- told in the trial's events, with its traceback
            self._reports = None
            self._events.settle()
            return self._end_result({**self._last_metrics, self._shared.metric: float("nan")})
        if report is None:
            return self._end_result(self._last_metrics) | {TRAINING_ENDED: True}
        self._last_metrics = self._seen_by_ray(report.metrics)
        has_checkpoint = report.checkpoint_path is not None
        if report.checkpoint_path is not None:
            shutil.move(report.checkpoint_path, self._checkpoint)
            self._writer = self.trial_name
        self._is_over = report.is_final
        result = {**self._last_metrics, "done": report.is_final, "should_checkpoint": has_checkpoint}
        if report.is_final:
            self._end_trial()
            return {**result, TRAINING_ENDED: True}
        self._events.settle()  # a scheduler may end the trial now, and Ray this process
        return result

    def _take_newest_checkpoint(self) -> None:
        """Go on from the newest stored checkpoint that is whole, unless the scheduler gave it another's.

        What Ray gives is the newest that it knows of; the trial may have stored one since, on its own, and
        the upload of what Ray knows may have been cut off.
        """
        if self._cloned_from:
            return
        self._checkpoint.unlink(missing_ok=True)
        deadline = time.monotonic() + _STORAGE_PATIENCE_SECONDS
        while not self._shared.checkpoints.is_there():
            if time.monotonic() > deadline:
                raise OSError(errno.ENOENT, "the sweep's storage is gone", self._shared.checkpoints.folder)
            time.sleep(_STORAGE_PAUSE_SECONDS)
        self._is_resumed = self._store.fetch_newest(self._checkpoint)
        self._writer = self.trial_name

    @property
    def _store(self) -> CheckpointStore:
        place = self._shared.checkpoints
        return replace(place, folder=f"{place.folder}/{self.trial_name}")

    def _wait_for_end(self) -> dict[str, Any]:
        """Wait until Ray Tune has stopped looking for results, so that the trial counts as running."""
        ray.get(self._shared.hub.end.remote())
        return self._end_result(self._last_metrics)

    def _seen_by_ray(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics that schedulers read; the others are in the trial's events.

        Of each that it is told Ray Tune keeps statistics as long as the sweep lasts, a kilobyte and more.
        """
        return {name: metrics[name] for name in (TIME, self._shared.metric) if name in metrics}

    def _end_result(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return a result that ends the trial, with what schedulers read from every one."""
        return {TIME: 0, self._shared.metric: float("nan"), **metrics, "done": True}

    def _run(self) -> Iterator[Report]:
        name, spec = self.trial_name, self._spec()
        cache = SharedProbeCache(
            self._shared.hub, name, attempt_timeout_seconds=spec.settings.probe_timeout_seconds
        )
        return run_trial(spec, partial(self._tell, name), cache, partial(self._start, spec))

    def _tell(self, name: str, event: Event) -> None:
        if isinstance(event, Interrupted) and self._is_interrupted:
            event = Interrupted(reason="the sweep was interrupted", is_failure=False, details=event.details)
        self._events.send(name, event)

    def _start(self, spec: TrialSpec, opening: Opening) -> TrialProcesses:
        """Start the trial's processes, or have the child that is kept take it over."""
        processes: TrialProcesses
        if len(self._bundles) > 1:
            processes = WorkerProcesses(opening, self._actors)
        elif spec.task_payload is None and spec.device == "cpu":
            processes = self._function_child.begin(opening)
        else:
            processes = TrialChildren(opening, spec.preloaded_modules)
        self._processes = processes
        if self._is_interrupted:
            processes.terminate()
        return processes

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Have Ray store the last checkpoint; a storage that does not take it costs this one, not the trial.

        After the last report there is no next one, so that is worth waiting for.
        """
        deadline = time.monotonic() + (_STORAGE_PATIENCE_SECONDS if self._is_over else 0.0)
        while True:
            try:
                return super().save(checkpoint_dir)
            except (OSError, RuntimeError) as error:  # the latter where Ray does not find its own files there
                if time.monotonic() < deadline:
                    time.sleep(_STORAGE_PAUSE_SECONDS)
                    continue
                why = (isinstance(error, OSError) and error.strerror) or "the sweep's folder is not there"
                reason = f"cannot write to {self._store.folder}: {why}"
            self._events.send(self.trial_name, CheckpointLost(reason=reason))
            return _TrainingResult(checkpoint=None, metrics={})

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the trial's last checkpoint to where Ray stores it."""
        if self._checkpoint.is_file():
            shutil.copy2(self._checkpoint, Path(checkpoint_dir) / CHECKPOINT_NAME)
            (Path(checkpoint_dir) / _WRITER_NAME).write_text(self._writer)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take a better trial's checkpoint that Ray stored; those of its own it looks up when it starts."""
        stored, writer = Path(checkpoint) / CHECKPOINT_NAME, Path(checkpoint) / _WRITER_NAME
        if not stored.is_file() or not writer.is_file():  # an upload that was cut off
            return
        if (name := writer.read_text()) != self.trial_name:
            shutil.copy2(stored, self._checkpoint)
            self._is_resumed, self._writer, self._cloned_from = True, name, name

    def cleanup(self) -> None:
        """End the child and remove what is local."""
        self._end_trial()
        with contextlib.suppress(RayError):  # the sweep may be over
            self._events.settle()
        self._actors.kill()
        self._function_child.kill()
        self._scratch.remove()

    def _end_trial(self) -> None:
        if self._reports is not None:
            self._reports.close()  # type: ignore[attr-defined]  # a generator
            self._reports = None

    def _spec(self) -> TrialSpec:
        shared = self._shared
        known = None if self._cloned_from else shared.begun.get(self.trial_name)
        config = copy.deepcopy(known) or shared.space.config_from_ray(self._config)
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
            timeout_seconds=shared.timeout_seconds,
            grace_seconds=shared.grace_seconds,
            store=self._store,
            scratch_parent=str(self._scratch.path),
        )


def trial_name(trial: Any) -> str:
    """Return our id of one of Ray's trials, by which Ray is to call it.

    It is the trial's number in the sweep. Ray's own id ends in that, save where a search algorithm chose the
    trial: then its tag begins with the number, counted from 1.
    """
    _, _, number = trial.trial_id.partition("_")
    return trial_id(int(number) if number else int(trial.experiment_tag.partition("_")[0]) - 1)
