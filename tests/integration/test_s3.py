"""Whole sweeps whose results are kept in an object store: a server on loopback that speaks S3."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pyarrow import fs
from s3_server import ENVIRONMENT, Gate, S3Server
from waiting import wait_for

import tune_easytrain as te
from tune_easytrain.errors import BadInputError

CLI = [str(Path(sys.executable).with_name("tune-easytrain"))]
SAME_IN_ANY_RUN = [
    "trial_id", "state", "model.type", "hp.batch_size", "effective_batch_size", "accumulation_steps",
    "num_samples", "optimizer_steps", "epochs", "train_loss_last", "val_loss_last", "val_loss_best",
]  # fmt: skip
PATIENCE_SECONDS = 400
OUTAGE_SECONDS = 20


@pytest.fixture(autouse=True)
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_of_the_tests"))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def all_objects(server: S3Server, bucket: str) -> dict[str, bytes]:
    store = fs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{server.port}")
    infos = store.get_file_info(fs.FileSelector(bucket, recursive=True))
    return {info.path: store.open_input_stream(info.path).read() for info in infos if info.is_file}


def undisturbed(sweep: dict[str, Any], tmp_path: Path) -> pd.DataFrame:
    sweep["config"]["toy"]["seconds_per_loss"] = 0
    sweep["run"]["storage"] = str(tmp_path / "undisturbed")
    return te.run(sweep, quiet=True, debug=True).frame()


def test_a_sweep_whose_machine_is_lost_goes_on_from_its_url_on_another(
    slow_sweep: dict[str, Any], server: S3Server, tmp_path: Path
) -> None:
    slow_sweep["run"]["storage"] = server.url("bucket/lost")
    slow_sweep["config"]["toy"]["seconds_per_loss"] = 0.1  # epochs of a second: each event is stored at once
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(slow_sweep, sort_keys=False))
    said = tmp_path / "said"
    with said.open("w") as sink:
        driver = subprocess.Popen(
            [*CLI, "run", str(file)], stdout=sink, stderr=sink, start_new_session=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache_of_the_driver")},
        )  # fmt: skip
    try:
        wait_for(lambda: "If interrupted: " in said.read_text(), "the run directory", PATIENCE_SECONDS)
        (line,) = [line for line in said.read_text().splitlines() if line.startswith("If interrupted: ")]
        resume = shlex.split(line.removeprefix("If interrupted: "))
        url = resume[-1]

        def second_trial_is_under_way() -> bool:  # as everybody sees it who reads the bucket
            try:
                records = te.load_results(url).records()
            except BadInputError:
                return False
            return len(records) > 1 and 1 <= len(records[1].reports) < 4

        wait_for(second_trial_is_under_way, "the second trial's first epoch", PATIENCE_SECONDS)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    killed = te.load_results(url)
    assert killed.frame()["state"].tolist()[::2] == ["finished", "pending"]
    finished_file = (killed.run_dir / "trials" / "trial_00000.jsonl").read_bytes()

    done = subprocess.run(
        [*CLI, *resume[1:]], capture_output=True, text=True, check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache_of_another_machine")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    parquet = tmp_path / "results.parquet"
    shown = subprocess.run([*CLI, "results", url, "--parquet", str(parquet)], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    frame = te.load_results(url).frame()
    assert pd.read_parquet(parquet)["val_loss_best"].equals(frame["val_loss_best"])
    assert (killed.run_dir / "trials" / "trial_00000.jsonl").read_bytes() == finished_file
    assert [report["epoch"] for report in te.load_results(url).records()[1].reports] == [1, 2, 3, 4]
    assert frame[SAME_IN_ANY_RUN].equals(undisturbed(slow_sweep, tmp_path)[SAME_IN_ANY_RUN])

    secret = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]
    objects = all_objects(server, "bucket")
    assert any(name.endswith("checkpoint.pt") for name in objects)
    assert any(name.endswith("tuner.pkl") for name in objects)
    assert [name for name, content in objects.items() if secret.encode() in content] == []
    assert secret not in said.read_text() + done.stdout + done.stderr


def test_a_store_that_is_away_for_a_while_costs_no_trial_and_no_result(
    slow_sweep: dict[str, Any], server: S3Server, tmp_path: Path, local_ray: None
) -> None:
    gate = Gate(server)
    slow_sweep["run"]["storage"] = server.url("bucket/away", gate.port)
    slow_sweep["grid_search"]["grid"] = {"model.type": ["small", "large"], "hp.batch_size": [4, 7]}

    def be_away() -> None:
        events = Path(os.environ["XDG_CACHE_HOME"])
        wait_for(
            lambda: any('"reported"' in file.read_text() for file in events.rglob("*.jsonl")),
            "an epoch",
            PATIENCE_SECONDS,
        )
        gate.shut()
        time.sleep(OUTAGE_SECONDS)
        gate.open()

    outage = threading.Thread(target=be_away, daemon=True)
    outage.start()
    url = te.run(slow_sweep, quiet=True).place
    outage.join()
    frame = te.load_results(server.url(url.partition("?")[0].removeprefix("s3://"))).frame()
    assert frame[SAME_IN_ANY_RUN].equals(undisturbed(slow_sweep, tmp_path)[SAME_IN_ANY_RUN])


def test_what_cannot_be_stored_is_told_before_anything_starts(
    toy_sweep: dict[str, Any], server: S3Server, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.yaml"
    toy_sweep["run"]["storage"] = server.url("nowhere/runs")
    file.write_text(yaml.safe_dump(toy_sweep, sort_keys=False))
    for arguments in (
        ["run", str(file)],
        ["results", server.url("nowhere/run")],
        ["resume", server.url("bucket/no")],
    ):
        done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
    assert "is not a run directory" in done.stderr
    assert not (tmp_path / "cache_of_the_tests").exists()


def test_debug_runs_are_stored_too(toy_sweep: dict[str, Any], server: S3Server, tmp_path: Path) -> None:
    toy_sweep["run"]["storage"] = server.url("bucket/debug")
    results = te.run(toy_sweep, quiet=True, debug=True)
    names = all_objects(server, "bucket/debug")
    assert sum(name.endswith(".jsonl") for name in names) == 2
    assert te.load_results(results.place).frame().equals(results.frame())
