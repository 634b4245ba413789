"""Jobs of a Ray cluster, over HTTP: what they say, how they end, and stopping them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests

from tune_easytrain.errors import TuneEasyTrainError
from tune_easytrain.jobs_client import asking, connect

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

EXIT_STOPPED = 143
"""The exit code of a job that was stopped: what a shell makes of SIGTERM."""

STOP_SECONDS = 30
"""Seconds that a job has for its end once it is told to stop."""

FILE_KEY = "tune_easytrain_file"
"""The key, in a job's metadata, of the sweep file or command that was sent."""

_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_RUN_DIR = re.compile(r"^Run directory: (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as the cluster tells of it.

    `status` is Ray's word in small letters (pending, running, succeeded, failed, stopped), `exit_code` None
    until it has ended; `file` is what was sent, times are in seconds since 1970, `message` says why a job
    that never started did not.
    """

    job_id: str
    status: str
    exit_code: int | None
    file: str
    start_time: float | None
    end_time: float | None
    message: str


def follow(job_id: str, *, address: str | None = None, write: Callable[[str], object] | None = None) -> int:
    """Write what a job says until it ends, and return its exit code.

    A connection that breaks is made again, without saying anything twice. Ctrl-C leaves the job running:
    KeyboardInterrupt passes through.

    Args:
        job_id: the job, at whatever point it is.
        address: `http://HEAD:8265`, `auto`, or None for Ray's environment variables.
        write: takes the text, in whole lines as a rule; default: standard output.

    Returns: 0 done, 1 trials failed, 2 bad input, as `tune-easytrain run` ends; 143 a job that was stopped.

    Raises BadInputError where there is no such job, TuneEasyTrainError where the cluster is out of reach for
    minutes.
    """
    client = connect(address)
    _find_info(client, job_id)
    write = write or _print
    asyncio.run(_write_logs(client, job_id, write))
    state = _as_state(job_id, _find_info(client, job_id))
    if state.message:
        write(f"{state.message}\n")
    return 1 if state.exit_code is None else state.exit_code


async def _write_logs(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> None:
    """Write a job's logs until it has ended and all is written, over as many connections as that takes."""
    written = 0
    last_answer = time.monotonic()

    async def stream() -> None:
        nonlocal written
        position = 0
        async for text in client.tail_job_logs(job_id):
            unseen = text[max(0, written - position) :]
            position += len(text)
            if unseen:
                write(unseen)
                written = position

    while not (has_ended := await _run_stream(stream(), client, job_id)):
        if has_ended is not None:
            last_answer = time.monotonic()
        elif time.monotonic() - last_answer > _PATIENCE_SECONDS:
            raise TuneEasyTrainError(
                f"the cluster has been out of reach for {_PATIENCE_SECONDS / 60:g} minutes; the job {job_id} "
                f"may still run: tune-easytrain logs {job_id} --follow --address {client.get_address()}"
            )
        await asyncio.sleep(_RETRY_SECONDS)
    with asking(client, job_id):  # a stream may end before the logs do
        logs = await asyncio.to_thread(client.get_job_logs, job_id)
    if len(logs) > written:
        write(logs[written:])


async def _run_stream(
    stream: Coroutine[Any, Any, None], client: JobSubmissionClient, job_id: str
) -> bool | None:
    """Run one connection and return whether the job has ended, None where the cluster does not answer."""
    task = asyncio.create_task(stream)
    has_ended = None
    while not (task.done() or has_ended):  # a connection that died in silence is told by its job's end
        await asyncio.wait({task}, timeout=_POLL_SECONDS)
        has_ended = await asyncio.to_thread(_has_ended, client, job_id)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return has_ended


def _has_ended(client: JobSubmissionClient, job_id: str) -> bool | None:
    """Return whether a job has ended, None where the cluster does not answer."""
    try:
        return client.get_job_info(job_id).status.is_terminal()
    except (requests.RequestException, RuntimeError):
        return None


def find_state(job_id: str, *, address: str | None = None) -> JobState:
    """Return how a job stands; raises BadInputError where there is no such job."""
    return _as_state(job_id, _find_info(connect(address), job_id))


def list_states(*, address: str | None = None) -> list[JobState]:
    """Return how the jobs stand that were sent by this package, oldest first."""
    client = connect(address)
    with asking(client):
        infos = client.list_jobs()
    states = [
        _as_state(info.submission_id, info)
        for info in infos
        if info.submission_id and FILE_KEY in (info.metadata or {})
    ]
    return sorted(states, key=lambda state: state.start_time or float("inf"))


def read_logs(job_id: str, *, address: str | None = None) -> str:
    """Return all that a job has said so far; raises BadInputError where there is no such job."""
    client = connect(address)
    with asking(client, job_id):
        return client.get_job_logs(job_id)


def stop(job_id: str, *, address: str | None = None) -> JobState:
    """Stop a job, wait for its end and return how it ended; one that has ended is left as it is.

    The sweep's trials end with it, and it can be resumed. Raises BadInputError where there is no such job,
    TuneEasyTrainError where it does not end.
    """
    client = connect(address)
    with asking(client, job_id):
        client.stop_job(job_id)
    deadline = time.monotonic() + STOP_SECONDS + _POLL_SECONDS
    while not (info := _find_info(client, job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise TuneEasyTrainError(f"{job_id} has been told to stop and still runs; ask again in a while")
        time.sleep(0.2)
    return _as_state(job_id, info)


def find_run_dir(logs: str) -> str | None:
    """Return the run directory that a job's sweep named in its logs, None before it did."""
    match = _RUN_DIR.search(logs)
    return match[1].strip() if match else None


def _find_info(client: JobSubmissionClient, job_id: str) -> JobDetails:
    with asking(client, job_id):
        return client.get_job_info(job_id)


def _as_state(job_id: str, info: JobDetails) -> JobState:
    return JobState(
        job_id=job_id,
        status=info.status.value.lower(),
        exit_code=_exit_code(info),
        file=(info.metadata or {}).get(FILE_KEY, info.entrypoint),
        start_time=_seconds(info.start_time),
        end_time=_seconds(info.end_time),
        # Ray's other messages repeat the status, or the logs.
        message=(info.message or "") if info.status == "FAILED" and info.driver_exit_code is None else "",
    )


def _exit_code(info: JobDetails) -> int | None:
    if not info.status.is_terminal():
        return None
    if info.status == "STOPPED":
        return EXIT_STOPPED
    if info.status == "SUCCEEDED":
        return 0
    code = info.driver_exit_code or 1  # a job that could not even be started has none
    return code if code > 0 else 128 - code  # ended by a signal


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _print(text: str) -> None:
    print(text, end="", flush=True)
