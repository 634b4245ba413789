"""The URL of an object store: what may stand in it, and that no secret does."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from tune_easytrain.errors import StorageError, did_you_mean
from tune_easytrain.plain_text import printable

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""What `pyarrow.fs` can open; of these s3 is tested."""

_S3_PARAMETERS = ("endpoint_override", "scheme", "region", "force_virtual_addressing", "tls_ca_file_path")
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # as the AWS tools rank them
_REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_SECRET = re.compile(r"key|secret|token|password|credential|signature|^sig$", re.IGNORECASE)
_WHERE_SECRETS_BELONG = {
    "s3": "put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile in AWS_PROFILE",
    "abfs": "put them into AZURE_STORAGE_KEY, or log in with `az login`",
}


def is_url(place: str) -> bool:
    """Return whether a place is a URL and no path."""
    return _URL.match(place) is not None


@dataclass(frozen=True, slots=True)
class StorageUrl:
    """A checked URL, such as `s3://bucket/folder?endpoint_override=localhost:9000&scheme=http`.

    Attributes:
        scheme: one of `SCHEMES`.
        authority: what stands between `//` and the path; for S3 the bucket.
        path: the rest without slashes at its ends; empty for the whole bucket.
        parameters: what stands behind `?`.
    """

    scheme: str
    authority: str
    path: str
    parameters: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> StorageUrl:
        """Check a URL; raises StorageError, which never repeats a secret, where it cannot be used."""
        match = _URL.match(text)
        scheme = match["scheme"].lower() if match else ""
        if scheme not in SCHEMES:
            raise StorageError(
                f"{scheme}:// is no storage that is known",
                f"give a folder, or a URL that begins with {_either()}",
            )
        try:
            parts = urlsplit(text)
        except ValueError:
            raise StorageError(
                f"a URL of {scheme}:// cannot be read", f"write {scheme}://bucket/folder"
            ) from None
        parameters = tuple(parse_qsl(parts.query, keep_blank_values=True))
        _refuse_secrets(scheme, parts.netloc, parameters)
        path = unquote(parts.path)
        if printable(path) != path or {"\n", "\t"} & set(path):
            raise StorageError(f"a URL of {scheme}:// has control characters", "remove them")
        names = [name for name in path.split("/") if name]
        url = cls(scheme, parts.netloc, "/".join(names), parameters)
        if not parts.netloc and scheme not in ("hdfs", "viewfs"):
            raise StorageError(f"{url} names no bucket", f"write {scheme}://bucket/folder")
        if {".", ".."} & set(names):
            raise StorageError(f"{url} has parts `.` or `..`, which no store knows", "write the whole path")
        if parts.fragment:
            raise StorageError(f"{url} has a part behind `#`", "remove it")
        if scheme == "s3":
            for name, _ in parameters:
                if name not in _S3_PARAMETERS:
                    raise StorageError(
                        f"{url} has an unknown parameter {name!r}", did_you_mean(name, _S3_PARAMETERS)
                    )
        return url

    def __str__(self) -> str:
        query = f"?{urlencode(self.parameters, safe=':/')}" if self.parameters else ""
        return f"{self.scheme}://{self.authority}{'/' if self.path else ''}{quote(self.path)}{query}"

    def __truediv__(self, name: str) -> StorageUrl:
        """Return the URL of something inside."""
        return replace(self, path=posixpath.join(self.path, name))

    @property
    def parent(self) -> StorageUrl:
        """The URL of the folder that this one is in."""
        return replace(self, path=posixpath.dirname(self.path))

    @property
    def name(self) -> str:
        """The last part of the path; empty for a whole bucket."""
        return posixpath.basename(self.path)

    @property
    def identity(self) -> str:
        """What tells two places apart, however their URLs are written."""
        server = self.parameter("endpoint_override").rpartition("://")[2].rstrip("/")
        return f"{self.scheme}://{self.authority}/{self.path} {server}"

    def parameter(self, name: str) -> str:
        """Return a parameter's value, empty where it is not given."""
        return dict(self.parameters).get(name, "")

    def with_environment(self, environment: Mapping[str, str] = os.environ) -> StorageUrl:
        """Return the URL with what this process's environment adds: an S3 endpoint, and a region.

        So every node asks the same server, whatever its own environment says.
        """
        if self.scheme != "s3":
            return self
        added = list(self.parameters)
        endpoint = _first(environment, _ENDPOINT_VARIABLES)
        if endpoint and not self.parameter("endpoint_override"):
            if "@" in endpoint:
                raise StorageError(
                    "AWS_ENDPOINT_URL holds a user name", _WHERE_SECRETS_BELONG["s3"]
                )  # its value is not repeated
            added.append(("endpoint_override", endpoint))
        region = _first(environment, _REGION_VARIABLES)
        if region and not self.parameter("region"):
            added.append(("region", region))
        return replace(self, parameters=tuple(added))


def _refuse_secrets(scheme: str, authority: str, parameters: tuple[tuple[str, str], ...]) -> None:
    user, at, host = authority.rpartition("@")
    remedy = _WHERE_SECRETS_BELONG.get(scheme.rstrip("s") if scheme == "abfss" else scheme, "")
    remedy = remedy or "leave them out: the store's own environment variables are for that"
    if at and (":" in user or scheme == "s3"):
        raise StorageError(f"{scheme}://…@{host} holds a user name or a password", remedy)
    secret = [name for name, value in parameters if _SECRET.search(name) or "@" in value]
    if secret:
        raise StorageError(f"{scheme}://{authority}/… holds a secret in its parameter {secret[0]!r}", remedy)


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _either() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES)
