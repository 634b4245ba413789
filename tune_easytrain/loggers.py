"""The loggers of a sweep: what `run.loggers` names, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tune_easytrain.config import SweepConfig
from tune_easytrain.logger_config import LoggerConfig
from tune_easytrain.logger_thread import LoggerThread, TrialLog
from tune_easytrain.mirror import Mirror
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord

_NEEDS_RAY = ("wandb",)
_IS_TOLD_ONCE = ("wandb",)
"""Those that cannot be asked what they know, so that a resume tells them only of what is new."""


@contextmanager
def logged(
    config: SweepConfig,
    directory: RunDirectory,
    records: Iterable[TrialRecord],
    mirror: Mirror | None,
    say: Callable[[str], object],
    *,
    on_ray: bool = True,
) -> Iterator[Callable[[str], None]]:
    """Yield what is to be told the id of every trial whose file has grown; ends when all loggers know it all.

    A logger that fails is told of in a line. Nothing else of the sweep waits for it or fails with it.

    Args:
        config: the sweep; its `run.loggers` are started.
        directory: the run directory.
        records: the trials as they stand; what loggers have missed of them is made up for.
        mirror: uploads the files that loggers write, where the run directory is in an object store.
        say: told in a line what goes wrong.
        on_ray: whether there is a Ray, which some loggers need.
    """
    records = list(records)
    threads = []
    with ExitStack() as stack:
        for logger in config.run.loggers:
            if logger.name in _NEEDS_RAY and not on_ray:
                say(f"{logger.name} is left out: it needs Ray, and --debug has none")
                continue
            thread = LoggerThread(
                logger.name,
                partial(_build, logger, config, directory, mirror),
                directory,
                say,
                replays=logger.name not in _IS_TOLD_ONCE,
            )
            thread.start(records)
            stack.callback(thread.close)
            threads.append(thread)

        def note(trial_id: str) -> None:
            for thread in threads:
                thread.note(trial_id)

        yield note


def _build(
    logger: LoggerConfig, config: SweepConfig, directory: RunDirectory, mirror: Mirror | None
) -> TrialLog:
    """Return the log of a logger; its package is imported here, in the logger's own thread."""
    metric, mode = config.run.metric, config.run.mode
    if logger.name == "tensorboard":
        from tune_easytrain.tensorboard_log import TensorBoardLog

        def upload(path: Path, has_ended: bool) -> None:
            if mirror is not None:
                mirror.note_file(path, is_urgent=has_ended)

        return TensorBoardLog(directory, config.grid_search.grid, metric, mode, upload)
    if logger.name == "mlflow":
        from tune_easytrain.mlflow_log import MlflowLog

        return MlflowLog(logger, directory, config.name, metric, mode)
    from tune_easytrain.wandb_log import WandbLog

    return WandbLog(logger, directory, config.name, metric, mode)
