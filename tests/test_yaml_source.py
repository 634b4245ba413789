from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.errors import ConfigError, Fault
from tune_easytrain.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    YamlSource,
    load_yaml,
    read_text,
    show_path,
)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "sweep.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only_fault(folder: Path, content: str | bytes) -> Fault:
    path = write(folder, content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    (fault,) = caught.value.faults
    assert fault.source == str(path)
    return fault


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("+12", 12),
        ("0123", 123),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2026-11-05", "2026-11-05"),
        ("tRue", "tRue"),
        ("=", "="),
        ("1e", "1e"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
    ],
)
def test_plain_words_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    source, faults = read_text(f"key: {text}\n", "x")
    assert faults == []
    assert source.data == {"key": value}
    assert type(source.data["key"]) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(read_text(".nan", "x")[0].data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_what_pyyaml_quotes_is_read_back(value: Any) -> None:
    text = yaml.safe_dump(value, default_style='"', allow_unicode=False)
    source, faults = read_text(text, "x")
    assert faults == []
    assert source.data == value
    assert YamlSource.from_data({"key": value}).data == {"key": value}


def test_every_value_has_its_line(tmp_path: Path) -> None:
    text = "# top\na: 1\nb:\n  c.d: [5,\n    6]\n  e:\n    - x\n    - {y: 1,\n       z: 2}\n"
    source = load_yaml(write(tmp_path, text))
    expected = {
        (): 2,
        ("a",): 2,
        ("b",): 3,
        ("b", "c.d"): 4,
        ("b", "c.d", 0): 4,
        ("b", "c.d", 1): 5,
        ("b", "e"): 6,
        ("b", "e", 0): 7,
        ("b", "e", 1): 8,
        ("b", "e", 1, "y"): 8,
        ("b", "e", 1, "z"): 9,
    }
    assert dict(source.lines) == expected
    assert source.line_of(("b", "e", 1, "missing", "deeper")) == 8
    assert source.line_of(("missing",)) == 2
    assert source.fault(("b", "c.d", 1), "p", "r") == Fault(
        str(tmp_path / "sweep.yaml"), "b.c.d[1]", "p", "r", 5
    )


def test_all_faults_are_found_in_one_reading(tmp_path: Path) -> None:
    text = "a: 1\na: 2\n3: x\nb: !!python/object/apply:os.getcwd []\nc:\n  d: 1\n  d: 2\n"
    text += "~: 1\n? [q]\n: 1\n<<: 5\n"
    with pytest.raises(ConfigError) as caught:
        load_yaml(write(tmp_path, text))
    found = [(fault.line, fault.path, fault.problem) for fault in caught.value.faults]
    assert found == [
        (2, "a", "the key 'a' is given twice (first on line 1)"),
        (3, "", "the key 3 is not a string"),
        (4, "b", "the tag !!python/object/apply:os.getcwd is not allowed"),
        (7, "c.d", "the key 'd' is given twice (first on line 6)"),
        (8, "", "the key ~ is not a string"),
        (9, "", "the key (a sequence) is not a string"),
        (11, "", "the merge key << is not part of YAML 1.2"),
    ]
    assert all(fault.remedy for fault in caught.value.faults)


@pytest.mark.parametrize(
    "tag", ["!mine 1", "!!timestamp 2020-01-01", "!!binary aa==", "!!int x", "!!bool yes"]
)
def test_tags_that_make_other_values_are_refused(tmp_path: Path, tag: str) -> None:
    fault = only_fault(tmp_path, f"a: 1\nb: {tag}\n")
    assert (fault.line, fault.path) == (2, "b")
    assert tag.split()[0] in fault.problem


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1\nb: 2\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: *nothing\n", 1, "nothing"),
        ("a: 1\nb: '\x01'\n", 2, "U+0001"),
        ("a: 1\nb: &x [1, *x]\n", 2, "holds itself"),
        ("a: " + "9" * 5000, 1, "5000 digits"),
    ],
)
def test_what_cannot_be_read_is_a_fault_with_its_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    fault = only_fault(tmp_path, text)
    assert fault.line == line
    assert words in fault.problem
    assert fault.remedy


def test_files_that_are_not_text(tmp_path: Path) -> None:
    fault = only_fault(tmp_path, b"a: 1\nb: \xff\n")
    assert (fault.line, fault.problem) == (2, "byte 0xff is not UTF-8")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)
    assert load_yaml(write(tmp_path, b"\xef\xbb\xbfa: \xc3\xa9\r\n")).data == {"a": "é"}


def test_deep_nesting_and_multiplying_aliases_end_in_a_fault(tmp_path: Path) -> None:
    assert "deeply" in only_fault(tmp_path, "[" * 5000 + "]" * 5000).problem
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
    for level in range(1, 9):
        aliases = ",".join([f"*a{level - 1}"] * 10)
        bomb += f"a{level}: &a{level} [{aliases}]\n"
    assert f"more than {MAX_VALUES} values" in only_fault(tmp_path, bomb).problem


def test_aliases_are_separate_values() -> None:
    data = read_text("a: &x {v: [1]}\nb: *x\n", "x")[0].data
    assert data["a"] == data["b"]
    assert data["a"]["v"] is not data["b"]["v"]


def test_from_data_copies_and_refuses_what_yaml_has_not() -> None:
    data = {"a": [1], "b": (1, "x")}
    source = YamlSource.from_data(data)
    assert source.data == {"a": [1], "b": [1, "x"]}
    assert source.data["a"] is not data["a"]
    assert (source.source, source.line_of(("a", 0))) == ("<config>", None)
    with pytest.raises(ConfigError) as caught:
        YamlSource.from_data({"a": {1: 2}, "b": [Path("x")]})
    assert [(fault.path, fault.line) for fault in caught.value.faults] == [("a", None), ("b[0]", None)]
    assert "PosixPath('x')" in caught.value.faults[1].problem
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(ConfigError, match="holds itself"):
        YamlSource.from_data(loop)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (r'a: "\uD800"', "half a character"),
        (r'a: {"\uDCFF": 1}', "half a character"),
        (r'a: "\UFFFFFFFF"', "not valid YAML"),
        ("%YAML " + "1" * 5000 + ".1\n---\na: 1", "not valid YAML"),
        ("a: 18446744073709551616", "20 digits is too long"),
        ("a: 0x" + "f" * 4000, "4002 digits is too long"),
        ("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, f"more than {MAX_DEPTH} levels"),
        ("a: " + "x " * (MAX_BYTES // 2), "larger than 1.0 MiB"),
    ],
)
def test_what_nothing_could_hold_is_a_fault(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in only_fault(tmp_path, text).problem


def test_what_is_just_within_the_limits_is_read(tmp_path: Path) -> None:
    depth = MAX_DEPTH - 1
    text = f"a: {'[' * depth}{']' * depth}\nb: [-9223372036854775808, 18446744073709551615]"
    assert load_yaml(write(tmp_path, text)).data["b"] == [-(2**63), 2**64 - 1]


@pytest.mark.parametrize("value", [2**64, "\udcff", {"\udcff": 1}])
def test_a_dict_is_held_to_the_same(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"too long|character"):
        YamlSource.from_data({"a": value})


def test_replace_keeps_the_other_lines() -> None:
    source, _ = read_text("a: {b: 1}\nc: 2\n", "x")
    changed = source.replace(("a", "d", "e"), 5, "--set")
    assert changed.data == {"a": {"b": 1, "d": {"e": 5}}, "c": 2}
    assert source.data == {"a": {"b": 1}, "c": 2}
    assert changed.fault(("a", "d", "e"), "p") == Fault("--set", "a.d.e", "p")
    assert changed.fault(("a", "b"), "p").line == 1
    with pytest.raises(KeyError):
        source.replace(("c", "x"), 1, "--set")


def test_show_path() -> None:
    assert show_path(("a", "b.c", 1, 0, "d")) == "a.b.c[1][0].d"
    assert show_path(()) == ""
