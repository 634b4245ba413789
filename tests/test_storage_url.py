from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.config import load_config
from tune_easytrain.errors import ConfigError, StorageError
from tune_easytrain.storage_url import StorageUrl, is_url

SECRET = "wJalrXUtnFEMIK7MDENG"
WITH_SECRETS = [
    f"s3://AKIAUSER:{SECRET}@bucket/folder",
    f"s3://{SECRET}@bucket/folder",
    f"s3://bucket/folder?secret_key={SECRET}",
    f"s3://bucket/folder?access_key={SECRET}&region=x",
    f"s3://bucket/folder?endpoint_override=http://user:{SECRET}@host:9000",
    f"s3://bucket/folder?X-Amz-Signature={SECRET}",
    f"gs://user:{SECRET}@bucket/folder",
    f"abfs://:{SECRET}@account.blob.core.windows.net/container",
    f"abfss://container@account.dfs.core.windows.net/x?sig={SECRET}",
]
UNUSABLE = [
    ("ftp://host/folder", "ftp:// is no storage", "s3://"),
    ("s3:///folder", "names no bucket", "s3://bucket/folder"),
    ("s3://bucket/%1b[2J", "control characters", "remove"),
    ("s3://bucket/a%00", "control characters", "remove"),
    ("s3://bucket/a/../../b", "parts `.` or `..`", "whole path"),
    (
        "s3://bucket/folder?endpont_override=h:1",
        "unknown parameter 'endpont_override'",
        "'endpoint_override'",
    ),
    ("s3://bucket/folder#part", "behind `#`", "remove"),
    ("s3://[bucket/folder", "cannot be read", "s3://bucket/folder"),
]
NAMES = st.text(st.sampled_from("abc-_0. %?#é+"), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_a_secret_is_refused_and_never_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"holds a") as caught:
        StorageUrl.parse(text)
    assert SECRET not in str(caught.value)
    assert caught.value.remedy
    file = tmp_path / "sweep.yaml"
    file.write_text(f"batch: {{effective_batch_size: 8}}\nrun:\n  storage: '{text}'\n")
    with pytest.raises(ConfigError) as told:
        load_config(file)
    (fault,) = told.value.faults
    assert (fault.path, fault.line) == ("run.storage", 3)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(("text", "problem", "remedy"), UNUSABLE)
def test_a_url_that_cannot_be_used_is_told_with_what_to_write(text: str, problem: str, remedy: str) -> None:
    with pytest.raises(StorageError) as caught:
        StorageUrl.parse(text)
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


@given(st.sampled_from(["s3", "gs", "abfs"]), st.lists(NAMES, max_size=3), st.booleans())
def test_a_url_is_read_as_it_is_written(scheme: str, names: list[str], has_region: bool) -> None:
    url = StorageUrl(scheme, "bucket", "/".join(names), (("region", "eu west/1"),) if has_region else ())
    assert StorageUrl.parse(str(url)) == url
    inside = url / "run" / "trials"
    assert inside.path.endswith("run/trials")
    assert inside.parent.parent == url
    assert inside.parameters == url.parameters


def test_slashes_at_the_end_mean_nothing() -> None:
    assert StorageUrl.parse("s3://bucket/a//b/") == StorageUrl.parse("s3://bucket/a/b")
    assert StorageUrl.parse("s3://bucket/") == StorageUrl.parse("s3://bucket")


def test_the_environment_adds_what_the_url_does_not_say() -> None:
    url = StorageUrl.parse("s3://bucket/folder")
    environment = {
        "AWS_ENDPOINT_URL": "http://any:1",
        "AWS_ENDPOINT_URL_S3": "http://s3:2",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }
    added = url.with_environment(environment)
    assert added.parameter("endpoint_override") == "http://s3:2"
    assert added.parameter("region") == "eu-west-1"
    own = StorageUrl.parse("s3://bucket/folder?endpoint_override=own:3").with_environment(environment)
    assert own.parameter("endpoint_override") == "own:3"
    assert url.with_environment({}) == url


def test_a_secret_in_the_environments_endpoint_is_not_repeated_either() -> None:
    url = StorageUrl.parse("s3://bucket/folder")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL holds a user name") as caught:
        url.with_environment({"AWS_ENDPOINT_URL": f"http://me:{SECRET}@host"})
    assert SECRET not in str(caught.value)


def test_one_place_is_known_however_its_endpoint_is_written() -> None:
    spellings = [
        StorageUrl.parse("s3://bucket/run?endpoint_override=127.0.0.1:9000&scheme=http"),
        StorageUrl.parse("s3://bucket/run?endpoint_override=http://127.0.0.1:9000/"),
        StorageUrl.parse("s3://bucket/run").with_environment({"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}),
    ]
    assert len({url.identity for url in spellings}) == 1
    assert StorageUrl.parse("s3://bucket/run").identity != spellings[0].identity


def test_paths_are_no_urls() -> None:
    assert not any(map(is_url, ("./runs", "/shared/runs", "~/runs", "a:b/c", "")))
    assert is_url("S3://bucket")
