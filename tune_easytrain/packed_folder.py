"""The folder that travels with a job: which of its files, and the archive they make."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec.patterns.gitignore import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.errors import BadInputError

_Rules = tuple[PurePosixPath, Sequence[GitIgnoreSpecPattern]]
"""A folder, and the lines of its ignore files, which speak of the paths in it; the last that does decides."""

MAX_BYTES = 500 * 2**20
"""Most bytes that a job may bring along; Ray itself refuses an archive of 512 MiB, after it has been sent."""

IGNORE_FILES = (".gitignore", ".rayignore")
NEVER_PACKED = frozenset({".git", ".venv", "venv", "__pycache__"})

_ENVIRONMENT_MARK = "pyvenv.cfg"
_NUM_BIGGEST = 5

_DATE = (1980, 1, 1, 0, 0, 0)
"""The date of every file: the archive depends on nothing but content, so Ray sends an equal one only once."""


@dataclass(frozen=True, slots=True)
class PackedFolder:
    """The files of a folder that travel.

    `sizes` has the bytes of each by its path in the folder, in order.
    """

    root: Path
    sizes: dict[PurePosixPath, int]

    @classmethod
    def scan(cls, root: str | Path, leave_out: Collection[str | Path] = ()) -> PackedFolder:
        """Find what travels: all but Python environments, `.git`, and what `.gitignore` or `.rayignore` name.

        Args:
            root: the folder.
            leave_out: further folders in it that stay here, as paths in it.

        Raises BadInputError where `root` is no folder.
        """
        folder = Path(os.path.abspath(root))
        if not folder.is_dir():
            raise BadInputError(f"{folder} is not a folder, so it cannot be sent with a job")
        left_out = frozenset(PurePosixPath(path) for path in leave_out)
        return cls(folder, dict(sorted(_files(folder, left_out, PurePosixPath(), (), frozenset()))))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values())

    def check_size(self, max_bytes: int = MAX_BYTES) -> None:
        """Raise BadInputError, with the biggest files, where the folder is too big to send."""
        if self.num_bytes <= max_bytes:
            return
        files = sorted(self.sizes.items(), key=lambda item: -item[1])[:_NUM_BIGGEST]
        folders = Counter[str]()
        for path, size in self.sizes.items():
            folders[path.parts[0] if len(path.parts) > 1 else "."] += size
        (top, top_size), *_ = folders.most_common(1)
        biggest = ", ".join(f"{path} ({format_bytes(size)})" for path, size in files)
        raise BadInputError(
            f"{self.root} is too big to send with a job: {format_bytes(self.num_bytes)} in "
            f"{len(self.sizes)} files, at most {format_bytes(max_bytes)} may be; {format_bytes(top_size)} of "
            f"it in {top}/; the biggest files: {biggest}. Name in .gitignore or .rayignore what the job does "
            "not need, or give a smaller --working-dir; data sets belong on the cluster's own storage"
        )

    def write(self, archive: str | Path, empty_dirs: Collection[PurePosixPath] = ()) -> None:
        """Write the files as a zip archive, with some empty folders more.

        Raises BadInputError where a file cannot be read.
        """
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in empty_dirs:
                zipped.writestr(zipfile.ZipInfo(f"{path}/", _DATE), b"")
            for path in self.sizes:
                file = self.root / path
                entry = zipfile.ZipInfo(str(path), _DATE)
                entry.compress_type = zipfile.ZIP_DEFLATED
                try:
                    entry.external_attr = (file.stat().st_mode & 0o777) << 16
                    zipped.writestr(entry, file.read_bytes())
                except OSError as error:
                    raise BadInputError(
                        f"{file} cannot be sent with the job: {error.strerror}; name it in .rayignore"
                    ) from None


def _files(
    root: Path,
    left_out: Collection[PurePosixPath],
    folder: PurePosixPath,
    rules: tuple[_Rules, ...],
    above: frozenset[Path],
) -> Iterator[tuple[PurePosixPath, int]]:
    """Yield what travels of a folder, with its bytes.

    Args:
        folder: the folder, as a path in `root`.
        rules: what the ignore files above it say, the nearest last.
        above: the folders above it, without links, so that a circle of links ends.
    """
    place = (root / folder).resolve()
    if place in above:
        return
    rules += ((folder, _load_rules(root / folder)),)
    for entry in os.scandir(root / folder):
        path = folder / entry.name
        is_dir = entry.is_dir()
        if entry.name in NEVER_PACKED or path in left_out or _is_ignored(path, is_dir, rules):
            continue
        if not is_dir:
            if entry.is_file():  # neither a socket nor a link that leads nowhere
                yield path, entry.stat().st_size
        elif not (root / path / _ENVIRONMENT_MARK).exists():
            yield from _files(root, left_out, path, rules, above | {place})


def _load_rules(folder: Path) -> list[GitIgnoreSpecPattern]:
    files = [folder / name for name in IGNORE_FILES]
    patterns = []
    for file in files:
        lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                patterns.append(GitIgnoreSpecPattern(line))
            except GitIgnorePatternError:
                raise BadInputError(f"{file}:{number}: {line!r} is no pattern; remove the line") from None
    return patterns


def _is_ignored(path: PurePosixPath, is_folder: bool, rules: tuple[_Rules, ...]) -> bool:
    """Return what the nearest ignore file says that speaks of the path."""
    for folder, patterns in reversed(rules):
        name = f"{path.relative_to(folder)}{'/' if is_folder else ''}"
        for pattern in reversed(patterns):
            if pattern.regex is not None and _names(pattern.regex, name):
                return bool(pattern.include)
    return False


def _names(regex: re.Pattern[str], name: str) -> bool:
    """Return whether a pattern names this very path, as git has it, and not one of the folders above it.

    Those have been looked at before. pathspec's own match is of both, so that `!a/` would bring back a file
    `a/a` that `a` leaves out.
    """
    ends = [match.end() for match in regex.finditer(name)]
    if "ps_d" in regex.groupindex:  # the slash behind a folder's name, or the end
        return len(name) in ends
    if regex.pattern.endswith("/"):  # of `a/**`: what is in the folder, and not itself
        return any(end < len(name) for end in ends)
    return bool(ends)
