"""The Jobs API of a Ray cluster: reaching it, and telling a user why it cannot be reached."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import requests
from ray.exceptions import AuthenticationError

from tune_easytrain.credentials import has_user
from tune_easytrain.errors import BadInputError, TuneEasyTrainError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_ANSWER_SECONDS = 10.0
_STATUS_CODE = re.compile(r"status code (\d+)")


def find_address(address: str | None) -> str:
    """Return the address of the Jobs API: the given one, else that of Ray's environment variables.

    `auto` stands for the cluster that this machine is a node of. Raises BadInputError where there is none,
    or it is the address of something else.
    """
    source = "--address"
    if address is None:
        source = next((name for name in _ADDRESS_VARIABLES if os.environ.get(name)), "")
        address = os.environ.get(source)
    if not address:
        raise BadInputError(
            "--address: which cluster? Give the address of its dashboard, such as http://HEAD:8265, or set "
            f"{_ADDRESS_VARIABLES[0]}"
        )
    if address == "auto":
        return address
    if has_user(address):
        raise BadInputError(
            f"{source}: the address holds a user name or a password; leave it out, and put the cluster's "
            "token into RAY_AUTH_TOKEN"
        )
    scheme, separator, rest = address.partition("://")
    if scheme in ("http", "https") and separator and rest:
        return address.rstrip("/")
    host = re.split(r"[:/]", rest if separator else scheme)[0] or "HEAD"
    what = "Ray Client's address" if scheme == "ray" else "not an HTTP address"
    raise BadInputError(
        f"{source} {address}: that is {what}; jobs go to the dashboard's, such as http://{host}:8265"
    )


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the cluster's Jobs API.

    Raises BadInputError, within seconds, where nothing answers, something else than Ray does, or Ray refuses
    the token, and where a package is missing here.
    """
    url = find_address(address)
    if url != "auto":
        _check_is_ray(url)
    if not importlib.util.find_spec("aiohttp"):
        raise BadInputError(
            "jobs of a cluster need aiohttp, which this Python does not have; "
            "pip install 'tune-easytrain[cluster]'"
        )
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _address_variable(url):
            return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise _refused(url, error) from None
    except (ConnectionError, RuntimeError, requests.RequestException) as error:
        raise BadInputError(f"--address {url}: cannot reach the cluster's Jobs API: {error}") from None


def _check_is_ray(url: str) -> None:
    try:
        answer = requests.get(f"{url}/api/version", timeout=_ANSWER_SECONDS)
    except requests.RequestException as error:
        raise BadInputError(
            f"--address {url}: no dashboard answers there ({_reason(error)}); give the one that `ray start "
            "--head` printed; behind ssh, first: ray dashboard CLUSTER.yaml, then http://127.0.0.1:8265"
        ) from None
    if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
        return  # Ray's own client says what is wrong with the token
    try:
        version = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise BadInputError(
            f"--address {url}: what answers there is no Ray dashboard (status {answer.status_code}); its "
            "port is 8265 unless `ray start` was given another; the head needs ray[default]"
        )


def _reason(error: Exception) -> str:
    """Return what a failed connection comes down to, without the layers that pass it on."""
    if isinstance(error, requests.Timeout):
        return f"no answer in {_ANSWER_SECONDS:g} s"
    if "BadStatusLine" in str(error):
        return "what answers does not speak HTTP"
    reason: Any = error
    while isinstance(inner := getattr(reason, "reason", None) or next(iter(reason.args), None), Exception):
        reason = inner
    return re.sub(r"^.*?: (?=Failed)", "", str(reason))


@contextmanager
def _address_variable(url: str) -> Iterator[None]:
    """Let Ray's client go to `url` although RAY_ADDRESS, which it prefers to what it is given, says other."""
    name = _ADDRESS_VARIABLES[0]
    before = os.environ.get(name)
    if url != "auto":
        os.environ[name] = url
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)


@contextmanager
def asking(client: JobSubmissionClient, job_id: str = "") -> Iterator[None]:
    """Turn what Ray's client raises into errors for a user."""
    url = client.get_address()
    try:
        yield
    except AuthenticationError as error:
        raise _refused(url, error) from None
    except requests.RequestException as error:
        raise TuneEasyTrainError(f"--address {url}: the connection broke: {_reason(error)}") from None
    except RuntimeError as error:
        match = _STATUS_CODE.search(str(error))
        if job_id and match and int(match[1]) == requests.codes.not_found:
            raise BadInputError(
                f"there is no job {job_id} at {url}; `tune-easytrain status --address {url}` lists them"
            ) from None
        raise TuneEasyTrainError(f"--address {url}: {error}") from None


def _refused(url: str, error: AuthenticationError) -> BadInputError:
    reason = str(error).partition("\n")[0]
    return BadInputError(
        f"--address {url}: the cluster refuses: {reason}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the "
        "cluster's token (`ray get-auth-token` on its head prints it)"
    )
