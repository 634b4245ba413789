"""An object store as `pyarrow.fs` sees it: its files by name, and its errors in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from pyarrow import fs

from tune_easytrain.errors import StorageError
from tune_easytrain.plain_text import is_file_name
from tune_easytrain.storage_url import StorageUrl

_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 20.0
_GOOGLE_SECONDS = 60
_HASTY_ATTEMPTS = 3
_PATIENT_ATTEMPTS = 12
"""Attempts at one request of Ray's, as a checkpoint that cannot be stored fails its trial."""

_CODE = re.compile(r"AWS Error (?P<code>\w+) during (?P<operation>\w+) operation")
_REASON = re.compile(r"curlCode: \d+, (?P<reason>[^;]+)")
_NO_ACCESS = {
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "INVALID_SIGNATURE",
    "REQUEST_EXPIRED",
}
_SET_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give every node a role; they need to "
    "list, read, write and delete below this URL"
)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the store: its size in bytes, and when it was written, in nanoseconds since the epoch."""

    num_bytes: int
    mtime_ns: int


class PatientS3FileSystem(fs.S3FileSystem):  # type: ignore[misc]
    """S3 that outlasts a store's absence of about a minute, also where Ray has sent it to another process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(_PATIENT_ATTEMPTS))

    def __reduce__(self) -> tuple[Any, ...]:
        _, (options,) = super().__reduce__()
        return _build_patient, (options,)


def _build_patient(options: dict[str, Any]) -> PatientS3FileSystem:
    return PatientS3FileSystem(**options)


class ObjectStore:
    """The files below a URL. Requests that fail for a passing reason are tried again for some seconds.

    Everything here raises StorageError, with what to do, where the store does not do what it is asked.
    """

    def __init__(self, url: StorageUrl) -> None:
        self.url = url
        with _plain_errors(url):
            if url.scheme == "s3":
                self._options = _s3_options(url)
                strategy = fs.AwsStandardS3RetryStrategy(_HASTY_ATTEMPTS)
                # A small file is one request in place of three.
                self._files: Any = fs.S3FileSystem(
                    **self._options, retry_strategy=strategy, allow_delayed_open=True
                )
                self.path = f"{url.authority}/{url.path}".rstrip("/")
            else:
                self._files, self.path = fs.FileSystem.from_uri(str(_within_a_minute(url)))

    def patient_filesystem(self) -> Any:
        """Return the file system for Ray, which can be pickled and holds no secret."""
        return PatientS3FileSystem(**self._options) if self.url.scheme == "s3" else self._files

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole; one that exists is replaced."""
        with _plain_errors(self.url), self._files.open_output_stream(self._at(name)) as stream:
            stream.write(content)

    def read(self, name: str) -> bytes:
        """Return a file's content; raises FileNotFoundError where there is none."""
        with _plain_errors(self.url), self._files.open_input_stream(self._at(name)) as stream:
            return cast(bytes, stream.read())

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        with _plain_errors(self.url):
            try:
                self._files.delete_file(self._at(name))
            except FileNotFoundError:
                return

    def files(self, folder: str) -> dict[str, StoredFile]:
        """Return the files directly in a folder, by name; none where there is no such folder.

        Keys that could not be a file's name on this machine, as `..` could not, are passed over.
        """
        return {
            info.base_name: StoredFile(info.size, info.mtime_ns or 0)
            for info in self._entries(folder)
            if info.is_file
        }

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder, as `files` those of the files."""
        return [info.base_name for info in self._entries(folder) if not info.is_file]

    def _entries(self, folder: str) -> list[Any]:
        path = self._at(folder)
        with _plain_errors(self.url):
            infos = self._files.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=False))
        # A key `folder//name` makes the folder an entry of itself.
        return [info for info in infos if is_file_name(info.base_name) and info.path != path]

    def require_bucket(self) -> None:
        """Raise StorageError where the bucket does not exist, which listings do not tell; of S3 alone."""
        if self.url.scheme == "s3":
            with _plain_errors(self.url):
                is_there = self._files.get_file_info(self.url.authority).type != fs.FileType.NotFound
            if not is_there:
                raise _no_bucket(self.url)

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


def _within_a_minute(url: StorageUrl) -> StorageUrl:
    """Return the URL such that Google's client gives up sooner than after its quarter of an hour."""
    name = "retry_limit_seconds"
    if url.scheme not in ("gs", "gcs") or url.parameter(name):
        return url
    return replace(url, parameters=(*url.parameters, (name, str(_GOOGLE_SECONDS))))


def _s3_options(url: StorageUrl) -> dict[str, Any]:
    endpoint, region = url.parameter("endpoint_override"), url.parameter("region")
    if not endpoint and not region:
        region = fs.resolve_s3_region(url.authority)
    options: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "request_timeout": _REQUEST_SECONDS}
    if endpoint:
        options |= {"endpoint_override": endpoint}
    if url.parameter("scheme"):
        options |= {"scheme": url.parameter("scheme")}
    if url.parameter("tls_ca_file_path"):
        options |= {"tls_ca_file_path": url.parameter("tls_ca_file_path")}
    if url.parameter("force_virtual_addressing").lower() in ("1", "true"):
        options |= {"force_virtual_addressing": True}
    # Without any region pyarrow would ask the metadata service of a cloud machine for it.
    return options | {"region": region or "us-east-1"}


@contextmanager
def _plain_errors(url: StorageUrl) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        raise _explained(url, str(error)) from None


def _explained(url: StorageUrl, message: str) -> StorageError:
    """Return what an error means; its own text is left out where it could hold what nobody should read."""
    match = _CODE.search(message)
    where = _server(url)
    if match is None:
        lines = message.splitlines() or ["it does not answer"]
        return StorageError(f"{url}: {lines[0][:200]}", "check the URL and the store's own settings")
    code, reason = match["code"], f"{match['code']} during {match['operation']}"
    if code == "NO_SUCH_BUCKET" or (code == "UNKNOWN" and "404" in message):
        return _no_bucket(url)
    if code in _NO_ACCESS or "HTTP status 403" in message or "HTTP status 401" in message:
        return StorageError(f"{url}: {where} refuses access ({reason})", _SET_CREDENTIALS)
    if code in ("NETWORK_CONNECTION", "REQUEST_TIMEOUT"):
        told = _REASON.search(message)
        return StorageError(
            f"{url}: {where} does not answer ({told['reason'].strip() if told else reason})",
            "check the network and the endpoint: ?endpoint_override=host:port&scheme=http in the URL, or "
            "AWS_ENDPOINT_URL",
        )
    return StorageError(f"{url}: {where} answers {reason}", "check the URL and the endpoint")


def _server(url: StorageUrl) -> str:
    return url.parameter("endpoint_override") or "AWS"


def _no_bucket(url: StorageUrl) -> StorageError:
    return StorageError(
        f"{url}: there is no bucket {url.authority!r} at {_server(url)}", "create it, or name another"
    )
