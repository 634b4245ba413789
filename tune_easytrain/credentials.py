"""What is a secret by its name or its form: passwords, keys, tokens. They belong in the environment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRETS = {"password", "passwd", "passphrase", "secret", "credential", "credentials", "apikey"}
_KEYS = {"access", "account", "api", "encryption", "license", "private", "secret", "signing", "ssh"}
_TOKENS = {
    "access", "api", "auth", "authentication", "bearer", "bot", "github", "gitlab", "hf", "hub",
    "huggingface", "mlflow", "refresh", "sas", "security", "session", "tracking", "wandb",
}  # fmt: skip
"""What a token belongs to that is a secret; a `pad_token` is not."""

_PASSWORD_IN_URL = re.compile(r"[A-Za-z0-9+.-]://[^\s/?#@:]*:[^\s/?#@]+@")
_USER_IN_URL = re.compile(r"[A-Za-z0-9+.-]://[^\s/?#@]+@")

REMEDY = "leave it out, and let the task read an environment variable"


def is_secret_name(name: str) -> bool:
    """Return whether a key is that of a secret, by the words it ends in: `api_key`, `dbPassword`, `HF_TOKEN`.

    A name that goes on is another thing: `token_dim`, `password_file`.
    """
    *before, last = [word.lower() for word in _WORDS.findall(name)] or [""]
    if last == "token":
        return not before or before[-1] in _TOKENS or name.isupper()
    return last in _SECRETS or (last == "key" and bool(before) and before[-1] in _KEYS)


def has_password(text: str) -> bool:
    """Return whether a text holds a URL with a password in it, as `https://user:password@host`."""
    return _PASSWORD_IN_URL.search(text) is not None


def has_user(url: str) -> bool:
    """Return whether a URL names a user, with a password or as one: `https://token@host`."""
    return _USER_IN_URL.search(url) is not None


def without_users(text: str) -> str:
    """Return a text that quotes URLs without the users and passwords in them.

    >>> without_users("no answer from https://me:secret@host/api")
    'no answer from https://***@host/api'
    """
    return _USER_IN_URL.sub(lambda match: f"{match[0].partition('//')[0]}//***@", text)


def secrets_in(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of the values that are secrets; the path of `value` itself is the beginning of each.

    The name that counts is the last of the path, up to its last dot; numbers stand for the list they are in.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_in(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from secrets_in(item, (*path, index))
    elif isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        if is_secret_name(name.rpartition(".")[2]) or (isinstance(value, str) and has_password(value)):
            yield path
