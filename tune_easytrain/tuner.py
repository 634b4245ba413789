"""From a sweep to Ray Tune: what runs its trials, and what schedules them."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from ray import tune

from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.cluster import placement
from tune_easytrain.config import SweepConfig
from tune_easytrain.recorder import SweepCallback
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.search_algorithms import build_scheduler, build_searcher, num_checkpoints_kept
from tune_easytrain.search_space import build_trial_space, num_draws, param_space
from tune_easytrain.sweep_shared import SweepShared
from tune_easytrain.sweep_trial import SweepTrial, trial_name
from tune_easytrain.trial_request import TrialRequests


def build_trainable(
    config: SweepConfig,
    functions: tuple[bytes | None, bytes | None],
    requests: TrialRequests,
    hub: Any,
    ended: Mapping[str, Mapping[str, float]],
    begun: Mapping[str, dict[str, Any]],
    checkpoints: CheckpointStore,
) -> Any:
    """Return what Ray Tune runs trials by: `SweepTrial` with what the trials of a sweep have in common.

    Args:
        functions: `build_task` and the training function, pickled; None for what there is not.
        requests: what each trial asks for.
        hub: the handle of the sweep's `SweepHub`.
        ended, begun, checkpoints: as of `SweepShared`.
    """
    task, function = functions
    space = build_trial_space(config)
    shared = SweepShared(
        sweep_name=config.name,
        space=space,
        task_payload=task,
        function_payload=function,
        num_workers=config.trial.num_workers,
        metric=config.run.metric,
        mode=config.run.mode,
        hub=hub,
        ended=ended,
        begun=begun,
        checkpoints=checkpoints,
        preloaded_modules=modules_to_preload(task, function),
        timeout_seconds=config.trial.timeout,
        grace_seconds=config.trial.grace,
    )
    trainable = tune.with_resources(
        tune.with_parameters(SweepTrial, shared=shared),
        lambda params: placement(requests.of(space.point_from_ray(params))),
    )
    trainable.__qualname__ = SweepTrial.__qualname__  # Ray's dashboard shows it
    return trainable


def build_tuner(
    config: SweepConfig, directory: RunDirectory, trainable: Any, max_experiments: int
) -> tune.Tuner:
    """Return the tuner of a sweep that begins, or that Ray Tune knows nothing of."""
    run_config = config.run
    return tune.Tuner(
        trainable,
        param_space=param_space(config, max_experiments=max_experiments),
        tune_config=tune.TuneConfig(
            metric=run_config.metric,
            mode=run_config.mode,
            search_alg=build_searcher(config),
            scheduler=build_scheduler(config),
            num_samples=num_draws(config, max_experiments),
            max_concurrent_trials=run_config.max_concurrent,
            reuse_actors=True,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name=posixpath.basename(directory.ray_place[0]),
            storage_path=posixpath.dirname(directory.ray_place[0]),
            storage_filesystem=directory.ray_place[1],
            callbacks=[SweepCallback(directory.key)],
            # Every report with a checkpoint has it stored; at the end it would be stored once more.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=num_checkpoints_kept(config), checkpoint_at_end=False
            ),
            failure_config=tune.FailureConfig(max_failures=config.trial.max_failures),
            verbose=0,
        ),
    )
