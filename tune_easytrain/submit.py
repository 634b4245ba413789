"""A sweep as a job of a Ray cluster: checked and packed here, run there, not tied to this terminal.

`submit` sends a sweep file, `submit_command` any command. `jobs` has what follows: `follow`, `stop`, and
how a job stands.
"""

from __future__ import annotations

import os
import secrets
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.credentials import has_password, has_user, is_secret_name
from tune_easytrain.errors import BadInputError
from tune_easytrain.jobs import FILE_KEY, STOP_SECONDS
from tune_easytrain.jobs_client import asking, connect
from tune_easytrain.packed_folder import NEVER_PACKED, PackedFolder
from tune_easytrain.storage_url import StorageUrl, is_url
from tune_easytrain.task_source import find_file

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STORAGE_VARIABLE = "TUNE_EASYTRAIN_STORAGE"
"""The environment variable with which a cluster names the place of its results."""

HEAD_STORAGE = "~/tune_easytrain_runs"
"""Where results go on a head node without that variable, if `run.storage` would end with the job."""

_PROGRAM = ("python", "-m", "tune_easytrain")
_JOIN = ("--address", "auto")
_ROOT_FILE = "pyproject.toml"
_ROOT_MARK = ".git"
_ARCHIVE = "working_dir.zip"


def submit(
    file: str | Path,
    *,
    address: str | None = None,
    overrides: Sequence[str] = (),
    quick: bool = False,
    max_experiments: int | None = None,
    resume: str | None = None,
    working_dir: str | Path | None = None,
    pip: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    say: Callable[[str], object] | None = None,
) -> str:
    """Send a sweep to a cluster and return the id of its job, which runs whatever becomes of this process.

    The file is checked here. What travels is the folder of the project and this very package; the job runs
    `tune-easytrain run` in that folder on the head node, so relative paths in the file start there.

    Args:
        file: the sweep file.
        address: `http://HEAD:8265`; `auto` is the cluster that this machine is a node of; None takes
            RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
        overrides: `key=value` strings, as `--set` takes them.
        quick: put the values of the file's section `quick` in place first.
        max_experiments: keep only the first so many trials of the file's order.
        resume: a run directory on the cluster with which to go on, in place of a new one.
        working_dir: the folder that travels; default: the sweep file's project root.
        pip: requirements that every node installs for the job.
        env: environment variables of the job and of its trials; no secrets, since a cluster shows them.
        say: takes the lines that tell where things go.

    Raises:
        ConfigError: with every fault of the sweep file.
        BadInputError: the address, the folder (too big, or without what the sweep names), the options.
    """
    if resume is not None and (overrides or quick or max_experiments is not None):
        raise BadInputError(
            "--resume goes on with the sweep as it was; leave --set, --quick and --max-experiments out"
        )
    config = load_config(file, overrides=overrides, quick=quick)
    _refuse_secrets(env or {}, pip)
    if resume is not None and is_url(resume):
        StorageUrl.parse(resume)
    folder = Path(os.path.abspath(config.project_root if working_dir is None else working_dir))
    storage = lost_storage(config)
    packed = PackedFolder.scan(folder, leave_out=() if storage is None else (storage,))
    sweep_path = check_packed(config, packed)
    packed.check_size()
    if resume is None:
        entrypoint = run_entrypoint(
            sweep_path, overrides, max_experiments, quick=quick, keep_results=storage is not None
        )
    else:
        entrypoint = resume_entrypoint(resume)
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    if config.run.working_dir is not None:  # for the workers it takes the place of the job's folder
        variables["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    environment: dict[str, Any] = {
        "py_modules": [str(Path(__file__).parent)],
        "excludes": sorted(NEVER_PACKED),
        "env_vars": variables | dict(env or {}),
    }
    if pip:
        environment["pip"] = list(pip)
    client = connect(address)
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / _ARCHIVE
        packed.write(archive, root_marks(config, packed))
        if say is not None:
            say(f"Sending {packed.root}: {len(packed.sizes)} files, {format_bytes(packed.num_bytes)}")
            if storage is not None and resume is None:
                say(
                    f"run.storage: {config.run.storage} would end with the job; results go where "
                    f"{STORAGE_VARIABLE} says on the head node, or else to {HEAD_STORAGE} there"
                )
        environment["working_dir"] = str(archive)
        return _send(client, entrypoint, config.name, str(file), environment)


def submit_command(
    command: Sequence[str],
    *,
    address: str | None = None,
    name: str = "sweep",
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command on the head node as a job and return its id; nothing is packed, its files lie there.

    Args:
        command: program and arguments, such as `["python", "/root/ucf101.py", "--storage", "/shared/runs"]`.
        address: as for `submit`.
        name: the beginning of the job's id.
        env: environment variables of the job and of its trials.

    Raises BadInputError where nothing answers at the address, or it refuses.
    """
    _refuse_secrets(env or {})
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)} | dict(env or {})
    entrypoint = shlex.join(command)
    return _send(connect(address), entrypoint, name, entrypoint, {"env_vars": variables})


def _refuse_secrets(env: Mapping[str, str], pip: Sequence[str] = ()) -> None:
    """Raise BadInputError for secrets, which everybody could read with whom the cluster shares its jobs."""
    for name, value in env.items():
        if is_secret_name(name) or has_password(value):
            raise BadInputError(
                f"--env {name}: holds a secret, and a cluster shows the variables of its jobs; set it on the "
                "nodes, where only their users can read it"
            )
    if any(map(has_user, pip)):
        raise BadInputError(
            "--pip: a requirement holds a password or a token, and a cluster shows what its jobs install; "
            "name the package alone, and set the index on the nodes (pip.conf, ~/.netrc)"
        )


def _send(
    client: JobSubmissionClient, entrypoint: str, name: str, file: str, environment: dict[str, Any]
) -> str:
    with asking(client):
        job_id: str = client.submit_job(
            entrypoint=entrypoint,
            submission_id=f"{name}-{secrets.token_hex(4)}",
            runtime_env=environment,
            metadata={FILE_KEY: file},
        )
    return job_id


def run_entrypoint(
    sweep_path: PurePosixPath,
    overrides: Sequence[str],
    max_experiments: int | None,
    *,
    keep_results: bool,
    quick: bool = False,
) -> str:
    """Return the shell command that a job runs; with `keep_results` its storage is the head node's."""
    command = [*_PROGRAM, "run", str(sweep_path), *_JOIN]
    if quick:
        command.append("--quick")
    for override in overrides:
        command += ["--set", override]
    if max_experiments is not None:
        command += ["--max-experiments", str(max_experiments)]
    storage = f' --set "run.storage=${{{STORAGE_VARIABLE}:-{HEAD_STORAGE}}}"' if keep_results else ""
    return shlex.join(command) + storage


def resume_entrypoint(run_dir: str) -> str:
    """Return the shell command of a job that goes on with a run directory; `~/` is the head node's home."""
    path = f"~/{shlex.quote(run_dir[2:])}" if run_dir.startswith("~/") else shlex.quote(run_dir)
    return f"{shlex.join([*_PROGRAM, 'resume'])} {path} {shlex.join(_JOIN)}"


def lost_storage(config: SweepConfig) -> str | None:
    """Return the sweep's storage if it would end with the job: a relative path, which is in its folder."""
    storage = config.run.storage
    if is_url(storage) or storage.startswith(("/", "~")):
        return None
    return os.path.normpath(storage)


def root_marks(config: SweepConfig, packed: PackedFolder) -> list[PurePosixPath]:
    """Return what to add to the folder so that the sweep file's project root is the same there as here."""
    root = _path_in(packed, config.project_root) or PurePosixPath()  # it may be above
    if root / _ROOT_FILE in packed.sizes:
        return []
    return [root / _ROOT_MARK]


def check_packed(config: SweepConfig, packed: PackedFolder) -> PurePosixPath:
    """Return the sweep file's path in the folder that travels.

    Raises BadInputError unless it is there, and the files that the sweep names too.
    """
    assert config.source_path is not None
    sweep_path = _require(packed, config.source_path, "the sweep file")
    for key, function in (("task", config.task), ("train.function", config.train.own_function)):
        place = (function or "").rpartition(":")[0]
        if not place.endswith(".py"):
            continue
        if Path(place).expanduser().is_absolute():  # the cluster's own path, unless it is one of here
            inside = _path_in(packed, Path(place).expanduser())
            if inside is not None:
                raise BadInputError(
                    f"{key}: {place} is a path of this machine; write {inside}, from the project root"
                )
            continue
        sweep_dir = config.source_path.parent
        _require(packed, find_file(place, key, config.project_root, sweep_dir), key)
    folder = config.run.working_dir
    if folder is not None:
        inside = _path_in(packed, packed.root / folder)
        if inside is None or not (packed.root / inside).is_dir():
            raise BadInputError(
                f"run.working_dir: there is no folder {folder} in {packed.root}, which is sent with the job; "
                "write a path in it, or give --working-dir"
            )
    return sweep_path


def _require(packed: PackedFolder, path: Path, what: str) -> PurePosixPath:
    inside = _path_in(packed, path)
    if inside is None:
        raise BadInputError(
            f"{what}: {path} is not in {packed.root}, which is sent with the job; give --working-dir"
        )
    if inside not in packed.sizes:
        raise BadInputError(
            f"{what}: {path} is not sent with the job: .gitignore or .rayignore leaves it out"
        )
    return inside


def _path_in(packed: PackedFolder, path: Path) -> PurePosixPath | None:
    """Return a path as one in the folder, with or without links followed; None where it is outside."""
    for root, place in ((packed.root, Path(os.path.abspath(path))), (packed.root.resolve(), path.resolve())):
        if place.is_relative_to(root):
            return PurePosixPath(place.relative_to(root))
    return None
