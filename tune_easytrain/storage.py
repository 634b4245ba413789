"""`Storage`: the place where run directories are kept, a folder or an object store behind a URL."""

from __future__ import annotations

import functools
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_easytrain.errors import StorageError
from tune_easytrain.plain_text import is_file_name
from tune_easytrain.storage_url import StorageUrl, is_url

if TYPE_CHECKING:
    from tune_easytrain.object_store import ObjectStore, StoredFile

_MARKER = ".tune_easytrain_check_"


@dataclass(frozen=True, slots=True)
class Storage:
    """A place by its absolute path or its URL; cheap to pickle, and without secrets.

    Credentials are those that the process finds which reads or writes: environment variables, a profile, or
    its machine's role. The endpoint and the region are those of the process that made the object.

    Attributes:
        place: what the user is shown: the path, or the URL as it was given.
        url: the URL with what the environment adds to it; None for a folder.
    """

    place: str
    url: StorageUrl | None = None

    @classmethod
    def at(cls, place: str | Path) -> Storage:
        """Return the storage at a path or URL; raises StorageError for one that cannot be used."""
        if isinstance(place, Path) or not is_url(place):
            try:
                return cls(str(Path(place).expanduser().resolve()))
            except (ValueError, RuntimeError) as error:  # a zero byte, a user whom nobody knows
                raise StorageError(f"{str(place)!r} is no path: {error}", "give another folder") from None
        url = StorageUrl.parse(place)
        return cls(str(url), url.with_environment())

    def __str__(self) -> str:
        return self.place

    def __truediv__(self, name: str) -> Storage:
        """Return the storage of a folder inside this one."""
        if self.url is None:
            return Storage(str(self.folder / name))
        return Storage(str(StorageUrl.parse(self.place) / name), self.url / name)

    @property
    def parent(self) -> Storage:
        """The storage that this one is a folder of."""
        if self.url is None:
            return Storage(str(self.folder.parent))
        return Storage(str(StorageUrl.parse(self.place).parent), self.url.parent)

    @property
    def key(self) -> str:
        """The place without what differs between machines that reach it."""
        return self.place if self.url is None else str(replace(self.url, parameters=()))

    @property
    def is_remote(self) -> bool:
        """Whether it is an object store, of which a program keeps a local copy."""
        return self.url is not None

    @property
    def folder(self) -> Path:
        """The folder that it is; not for object stores."""
        assert self.url is None
        return Path(self.place)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole, with the folders above it; one that exists is replaced.

        This and the others raise StorageError where an object store, OSError where a folder fails.
        """
        if self.url is not None:
            _store(self.url).write(name, content)
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def read(self, name: str) -> bytes:
        """Return a file's content; raises FileNotFoundError where there is none."""
        return (self.folder / name).read_bytes() if self.url is None else _store(self.url).read(name)

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        if self.url is None:
            (self.folder / name).unlink(missing_ok=True)
        else:
            _store(self.url).delete(name)

    def files(self, folder: str) -> dict[str, StoredFile]:
        """Return the files directly in a folder of an object store, by name."""
        assert self.url is not None
        return _store(self.url).files(folder)

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder; those that cannot be shown are passed over.

        An object store cannot tell one that is not there from an empty one.
        """
        if self.url is not None:
            return _store(self.url).folders(folder)
        with os.scandir(self.folder / folder) as entries:
            return [entry.name for entry in entries if is_file_name(entry.name) and entry.is_dir()]

    def require_there(self) -> None:
        """Raise StorageError where there is no such folder or bucket; one in a bucket may be yet to come."""
        if self.url is not None:
            _store(self.url).require_bucket()
        elif not self.folder.is_dir():
            raise StorageError(f"{self} is no folder", "give a folder, or the URL of an object store")

    def ray_place(self, name: str) -> tuple[str, Any]:
        """Return path and file system (None: the local one) of a folder inside, as Ray Tune takes them."""
        if self.url is None:
            return str(self.folder / name), None
        store = _store(self.url)
        return f"{store.path}/{name}", store.patient_filesystem()

    def check(self) -> None:
        """Write, read and delete a small file; raises StorageError where any of that cannot be done."""
        name, content = f"{_MARKER}{secrets.token_hex(8)}", secrets.token_bytes(16)
        try:
            self.write(name, content)
            found = self.read(name)
            self.delete(name)
        except StorageError as error:
            raise StorageError(f"run.storage: {error.problem}", error.remedy) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"run.storage: {self}: {reason}", "choose another place") from None
        if found != content:
            raise StorageError(
                f"run.storage: {self}: what was written is not what is read", "choose another place"
            )


@functools.lru_cache(maxsize=8)
def _store(url: StorageUrl) -> ObjectStore:
    from tune_easytrain.object_store import ObjectStore

    return ObjectStore(url)
