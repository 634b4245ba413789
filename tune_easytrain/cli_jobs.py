"""The commands for sweeps on a cluster that outlive the terminal: `submit | status | logs | stop`.

`submit` and `logs --follow` end with the job's exit code: 0 done, 1 trials failed, 2 bad input, 143 stopped.
130 says that Ctrl-C left the job running. The other commands end with 0 if they did what was asked.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_easytrain.cli_options import (
    AsJson,
    File,
    MaxExperiments,
    Overrides,
    Quick,
    StartFrom,
    print_table,
    to_err,
    to_out,
    with_start,
)
from tune_easytrain.errors import BadInputError

if TYPE_CHECKING:
    from tune_easytrain.jobs import JobState

EXIT_DETACHED = 130

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
    ),
]
JobId = Annotated[
    str, typer.Argument(metavar="JOB", help="The id that `submit` printed.", show_default=False)
]


def submit(
    file: File,
    address: Address = None,
    overrides: Overrides = None,
    quick: Quick = False,
    start_from: StartFrom = None,
    max_experiments: MaxExperiments = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN_DIR", help="Go on with this run directory of the cluster, not a new one."),
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="The folder to send; default: the sweep file's project root.")
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(metavar="REQUIREMENT", help="A package that every node installs for the job."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="An environment variable of the job and its trials; no secret."
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the job's id and end, in place of following it.")
    ] = False,
) -> None:
    """Send a sweep to a cluster as a job, follow it, and end with its exit code.

    Ctrl-C, or a terminal that closes, leaves the job running.
    """
    from tune_easytrain import submit as sending
    from tune_easytrain.jobs_client import find_address

    address = find_address(address)
    job_id = sending.submit(
        file,
        address=address,
        overrides=with_start(overrides, start_from),
        quick=quick,
        max_experiments=max_experiments,
        resume=resume,
        working_dir=working_dir,
        pip=pip or [],
        env=_variables(env or []),
        say=to_err,
    )
    if no_wait:
        to_out(job_id)
        return
    to_err(f"Job {job_id} runs on the cluster, whatever becomes of this terminal; Ctrl-C leaves it running.")
    _follow(job_id, address)


def logs(
    job_id: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, and end with its exit code.")
    ] = False,
) -> None:
    """Show what a job has said."""
    from tune_easytrain.jobs import read_logs
    from tune_easytrain.jobs_client import find_address

    address = find_address(address)
    if follow:
        _follow(job_id, address)
    typer.echo(read_logs(job_id, address=address), nl=False)


def status(
    job_id: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="The id that `submit` printed; default: all jobs.")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show how a job stands, or all jobs that were sent."""
    from tune_easytrain.jobs import find_state, list_states

    states = list_states(address=address) if job_id is None else [find_state(job_id, address=address)]
    if as_json:
        rows = [dataclasses.asdict(state) for state in states]
        to_out(json.dumps(rows if job_id is None else rows[0], indent=2))
        return
    print_table(("job", "status", "exit code", "started", "ended", "what"), map(_cells, states))
    for state in states:
        if job_id is not None and state.message:
            to_out(state.message)


def stop(job_id: JobId, address: Address = None) -> None:
    """Stop a job; its sweep can be resumed."""
    from tune_easytrain.jobs import EXIT_STOPPED, find_run_dir, read_logs
    from tune_easytrain.jobs import stop as stop_job
    from tune_easytrain.jobs_client import find_address

    address = find_address(address)
    state = stop_job(job_id, address=address)
    if state.exit_code != EXIT_STOPPED:
        to_out(f"{job_id} had ended before: {state.status}, exit code {state.exit_code}")
        return
    run_dir = find_run_dir(read_logs(job_id, address=address))
    to_out(f"{job_id} is stopped")
    if run_dir is not None:
        command = ["tune-easytrain", "submit", state.file, "--resume", run_dir, "--address", address]
        to_out(f"To go on with it: {shlex.join(command)}")


def add_commands(app: typer.Typer) -> None:
    """Add the commands to a command line."""
    example = "http://127.0.0.1:8265"
    app.command(epilog=f"Example:  tune-easytrain submit configs/ucf101_demo.yaml --address {example}")(
        submit
    )
    app.command(epilog=f"Example:  tune-easytrain status --address {example}")(status)
    app.command(epilog=f"Example:  tune-easytrain logs ucf101_demo-1a2b3c4d --follow --address {example}")(
        logs
    )
    app.command(epilog=f"Example:  tune-easytrain stop ucf101_demo-1a2b3c4d --address {example}")(stop)


def _follow(job_id: str, address: str) -> None:
    from tune_easytrain.jobs import follow

    try:
        code = follow(job_id, address=address, write=lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        to_err(
            f"\nThe job goes on. To come back: tune-easytrain logs {job_id} --follow --address {address}\n"
            f"To end it: tune-easytrain stop {job_id} --address {address}"
        )
        raise typer.Exit(EXIT_DETACHED) from None
    raise typer.Exit(code)


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise BadInputError(f"--env {name}: write NAME=VALUE")
        variables[name] = value
    return variables


def _cells(state: JobState) -> list[str]:
    times = ["" if at is None else f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
             for at in (state.start_time, state.end_time)]  # fmt: skip
    code = "" if state.exit_code is None else str(state.exit_code)
    return [state.job_id, state.status, code, *times, state.file]
