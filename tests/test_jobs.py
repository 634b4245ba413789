from __future__ import annotations

from typing import Any

import pytest

from tune_easytrain.jobs import EXIT_STOPPED, _as_state, find_run_dir


def state(**details: Any) -> Any:
    from ray.job_submission import JobDetails

    return _as_state("job", JobDetails(type="SUBMISSION", entrypoint="python x.py", **details))


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "exit_code"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),  # killed, as a shell says it
        ("FAILED", None, 1),  # never started
        ("FAILED", 0, 1),  # Ray's own bookkeeping failed behind it
        ("STOPPED", None, EXIT_STOPPED),
    ],
)
def test_the_exit_code_is_the_jobs_and_never_0_unless_it_succeeded(status, driver_exit_code, exit_code):
    assert state(status=status, driver_exit_code=driver_exit_code).exit_code == exit_code


def test_a_state_tells_what_was_sent_and_why_a_job_never_started():
    found = state(
        status="FAILED", message="no pip", start_time=1_000, end_time=2_500,
        metadata={"tune_easytrain_file": "sweep.yaml"},
    )  # fmt: skip
    assert (found.status, found.file, found.message) == ("failed", "sweep.yaml", "no pip")
    assert (found.start_time, found.end_time) == (1.0, 2.5)
    # What else Ray says there repeats the logs.
    assert state(status="FAILED", driver_exit_code=1, message="last available logs ...").message == ""
    assert state(status="RUNNING", message="Job is currently running.").message == ""
    assert state(status="RUNNING").file == "python x.py"


def test_the_run_directory_is_found_in_the_logs():
    logs = "Mode: paired.\nRun directory: /root/runs/toy 1\nIf interrupted: ...\nRun directory: /other\n"
    assert find_run_dir(logs) == "/root/runs/toy 1"
    assert find_run_dir("Mode: paired.\n") is None
