from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tune_easytrain as te
from tune_easytrain.config import load_config
from tune_easytrain.credentials import has_password, has_user, is_secret_name, secrets_in, without_users
from tune_easytrain.errors import BadInputError, ConfigError
from tune_easytrain.fetched_run import fetch_script
from tune_easytrain.jobs_client import find_address
from tune_easytrain.submit import submit, submit_command

VALUE = "hunter2hunter2"


@pytest.mark.parametrize(
    "name",
    [
        "password", "db_password", "dbPassword", "PASSWORD", "passphrase", "client_secret", "api_key",
        "apiKey", "APIKey", "openai-api-key", "aws_secret_access_key", "private_key", "token", "auth_token",
        "hf_token", "tracking_token", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "WANDB_API_KEY",
        "AWS_SESSION_TOKEN", "credentials",
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "pad_token", "eos_token", "cls_token", "token_dim", "max_tokens", "tokenizer", "key", "key_dim",
        "num_key_value_heads", "sort_key", "attention_key", "password_file", "secret_dim", "PATH", "author",
        "TOKENIZERS_PARALLELISM", "passes",
    ],
)  # fmt: skip
def test_other_names_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


def test_passwords_and_users_in_urls() -> None:
    for url in ("https://user:pw@host/x", "s3://KEY:SECRET@bucket", "postgresql+psycopg://u:p@h:5432/db"):
        assert has_password(url)
        assert has_user(url)
    assert has_user("git+https://ghp_abc@github.com/o/r")
    for url in ("https://host:8265/a@b", "s3://bucket/a:b@c", "http://host/?q=a:b@c", "git@github.com:o/r"):
        assert not has_password(url)
        assert not has_user(url)
    assert not has_password("abfss://container@account.dfs.core.windows.net/x")


def test_what_quotes_a_url_is_shown_without_its_user() -> None:
    text = f"no answer from https://me:{VALUE}@host/x, nor from http://{VALUE}@other and http://plain:80/a@b"
    assert without_users(text) == (
        "no answer from https://***@host/x, nor from http://***@other and http://plain:80/a@b"
    )


def test_secrets_are_found_wherever_they_stand() -> None:
    value = {
        "a": {"api_key": VALUE, "list": [{"token": VALUE}, {"pad_token": "<pad>"}]},
        "url": f"https://u:{VALUE}@h",
        "n": {"password": 1234, "secret": None, "credentials": ""},
        "use_token": True,
        "x.y.passwords": 1,
        "x.y.password": [VALUE],
    }
    found = [("a", "api_key"), ("a", "list", 0, "token"), ("url",), ("n", "password"), ("x.y.password", 0)]
    assert list(secrets_in(value)) == found


SWEEP: dict[str, Any] = {"task": "m:f", "batch": {"effective_batch_size": 4}}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"config": {"logging": {"api_key": VALUE}}}, "config.logging.api_key"),
        ({"config": {"data": {"root": f"https://user:{VALUE}@host/data"}}}, "config.data.root"),
        ({"grid_search": {"grid": {"hub.token": [VALUE]}}}, "grid_search.grid.hub.token[0]"),
        ({"grid_search": {"grid": {"hub": [{"token": VALUE}]}}}, "grid_search.grid.hub[0].token"),
        ({"grid_search": {"grid": {"hub.token": VALUE}}}, "grid_search.grid.hub.token"),
        ({"run": {"storage": f"s3://KEY:{VALUE}@bucket/runs"}}, "run.storage"),
        ({"password": VALUE}, "password"),
    ],
)
def test_a_sweep_file_may_not_hold_one_and_the_error_does_not_repeat_it(
    changes: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config({**SWEEP, **changes})
    assert f"{path}: holds a secret" in str(raised.value)
    assert "environment variable" in str(raised.value)
    assert VALUE not in str(raised.value)


def test_nor_may_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(SWEEP, overrides=[f"config.hub.token={VALUE}"])
    assert "--set: config.hub.token: holds a secret" in str(raised.value)
    assert VALUE not in str(raised.value)


@pytest.mark.parametrize("place", [f"s3://KEY:{VALUE}@bucket/runs/x", f"s3://bucket/x?secret_key={VALUE}"])
def test_nor_the_url_of_a_run(place: str) -> None:
    for give in (te.load_results, te.resume, fetch_script):
        with pytest.raises(BadInputError) as raised:
            give(place)  # type: ignore[operator]
        assert VALUE not in str(raised.value)


def test_jobs_take_none_along(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("{task: m:f, batch: {effective_batch_size: 4}}")
    address = "http://127.0.0.1:1"  # nothing listens there: it is refused before that shows
    with pytest.raises(BadInputError, match="--env HF_TOKEN: holds a secret") as env:
        submit(sweep, address=address, env={"A": "b", "HF_TOKEN": VALUE})
    with pytest.raises(BadInputError, match="--env PROXY: holds a secret") as proxy:
        submit_command(["true"], address=address, env={"PROXY": f"http://me:{VALUE}@proxy:3128"})
    with pytest.raises(BadInputError, match="--pip: a requirement holds") as pip:
        submit(sweep, address=address, pip=["numpy", f"git+https://{VALUE}@github.com/o/r"])
    with pytest.raises(BadInputError, match="holds a user name or a password") as resume:
        submit(sweep, address=address, resume=f"s3://KEY:{VALUE}@bucket/runs/x")
    with pytest.raises(BadInputError, match="holds a user name or a password") as head:
        find_address(f"http://me:{VALUE}@head:8265")
    for raised in (env, proxy, pip, resume, head):
        assert VALUE not in str(raised.value)
