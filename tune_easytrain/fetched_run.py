"""A run directory fetched from a cluster's head node: the part that the results are made of."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
import shlex
import tarfile
import zlib
from pathlib import Path

import click

from tune_easytrain.errors import BadInputError, RunDirectoryError
from tune_easytrain.plain_text import is_file_name
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.storage_url import StorageUrl, is_url
from tune_easytrain.submit import HEAD_STORAGE, STORAGE_VARIABLE

_BEGIN, _END = "begin-of-run", "end-of-run"

_COPIES = '"${XDG_CACHE_HOME:-$HOME/.cache}"/tune_easytrain/runs'
"""Where a machine keeps its copies of run directories in object stores, as `local_copy.py` has it."""

_SCRIPT = """
run=$(ls -1dt {places} 2>/dev/null | head -n 1)
if [ -z "$run" ]; then echo "{begin}" none "{end}"; exit 0; fi
run=$(dirname "$run")
echo "{begin}"
tar -cz -C "$(dirname "$run")" "$(basename "$run")/sweep.json" "$(basename "$run")/trials" | base64
echo "{end}"
"""


def fetch_run(cluster_file: str | Path, run_dir: str | None, target: Path) -> RunDirectory:
    """Copy a run directory from the head node of a cluster, without checkpoints and Ray's own files.

    Args:
        cluster_file: the file that `ray up` was given.
        run_dir: a run directory by its path on the head or by its URL, or a folder of the head's, of which
            the newest is taken; default: the newest of those where `submit` puts them, and of its copies of
            those in object stores.
        target: an existing folder of this machine; the run directory is made in it.

    Raises BadInputError where the cluster cannot be reached, RunDirectoryError where there is no such run.
    """
    if not Path(cluster_file).is_file():
        raise BadInputError(
            f"--cluster {cluster_file}: there is no such file; give the one `ray up` was given"
        )
    output = _run_on_head(str(cluster_file), fetch_script(run_dir))
    return unpack_run(output, run_dir, target)


def fetch_script(run_dir: str | None) -> str:
    """Return the shell commands that print a run directory as text between two marks."""
    if run_dir is None:
        home = HEAD_STORAGE.replace("~", "$HOME", 1)
        folders = [f'"${{{STORAGE_VARIABLE}:-{home}}}"/*', f'"{home}"/*', f"{_COPIES}/*"]
    elif is_url(run_dir):
        StorageUrl.parse(run_dir)  # refuses one with a secret, before another machine's shell has it
        folders = [f"{_COPIES}/{shlex.quote(run_dir.rstrip('/').rpartition('/')[2])}-*"]
    else:
        quoted = f'"$HOME"/{shlex.quote(run_dir[2:])}' if run_dir.startswith("~/") else shlex.quote(run_dir)
        folders = [quoted, f"{quoted}/*"]
    places = " ".join(f"{folder}/sweep.json" for folder in folders)
    return _SCRIPT.format(places=places, begin=_BEGIN, end=_END)


def unpack_run(output: str, run_dir: str | None, target: Path) -> RunDirectory:
    """Write the run directory that `fetch_script` printed into `target`.

    What else a login shell or ssh prints, before, after or as line ends, does not matter. Raises
    RunDirectoryError where there is no run in it.
    """
    match = re.search(rf"{_BEGIN}(.*?){_END}", output, re.DOTALL)
    if match is None:
        raise RunDirectoryError(f"the cluster's head did not answer as expected:\n{output.strip()[-2000:]}")
    text = match[1].strip()
    if text == "none":
        where = f"{STORAGE_VARIABLE} and {HEAD_STORAGE}" if run_dir is None else run_dir
        raise RunDirectoryError(
            f"the cluster's head has no run directory in {where}; give the one that the sweep printed"
        )
    try:
        content = base64.b64decode(re.sub(r"\s", "", text), validate=True)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            names = {_unpack(archive, member, target) for member in archive if not member.isdir()}
    except (binascii.Error, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise RunDirectoryError(f"the run directory did not arrive whole: {error}; try again") from None
    return RunDirectory.open(target / min(names, default=""))


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> str:
    """Write one file of a run directory and return the directory's name.

    Raises RunDirectoryError for anything else: a head that strangers have got into could write anywhere.
    """
    file = archive.extractfile(member) if member.isreg() else None
    run, *inside = parts = member.name.split("/")
    if file is None or not all(map(is_file_name, parts)) or not _is_expected(inside):
        raise RunDirectoryError(
            f"the cluster's head sent {member.name!r}, which is no part of a run directory; nothing more of "
            "it was unpacked"
        )
    path = target.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.read())
    return run


def _is_expected(inside: list[str]) -> bool:
    return inside == ["sweep.json"] or (len(inside) == 2 and inside[0] == "trials")


def _run_on_head(cluster_file: str, script: str) -> str:
    from ray.autoscaler.sdk import configure_logging, run_on_cluster

    configure_logging(log_style="record", verbosity=0)
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            output = run_on_cluster(cluster_file, cmd=script, with_output=True)
    except (click.ClickException, SystemExit, RuntimeError, ValueError) as error:
        reason = told.getvalue().strip() or str(error)
        raise BadInputError(f"--cluster {cluster_file}: cannot reach the head: {reason}") from None
    return output.decode() if isinstance(output, bytes) else str(output)
