from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tune_easytrain.cli import main

pytest.importorskip("transformers")
pytest.importorskip("peft")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["tune-easytrain", "recommend", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def asked(**options: str) -> list[str]:
    given = {"model": "1b", "memory": "24GiB", "task": "classification"} | options
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_people_get_sizes_steps_and_what_takes_the_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *asked(method="lora", target="48", task="generation"), "--rule-of-thumb") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Llama 3.2 1B, 1.25 G parameters, 11.3 M of them trained" in shown.out
    assert "frozen weights in bf16, adapters in fp32" in shown.out
    for word in ("Largest micro-batch: ", "effective batch size", "peak of generation", "keys and values"):
        assert word in shown.out
    # 24 GiB are 25.8 GB; 80 % of them hold 137 times 0.15 GB.
    assert "Rule of thumb: a batch of 128; accumulation steps: 1 for 48, 1 for 32, 1 for 64." in shown.out
    assert "leaves out what weights, gradients and optimizer state take" in shown.out


def test_scripts_get_all_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, *asked(memory="40GB", target="100"), "--json", "--rule-of-thumb") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["fine_tuning"]["weights"] == "fp32"
    assert told["memory_bytes"] == 40 * 10**9
    assert list(told["accumulation"]) == ["100", "32", "64"]
    for size, plan in told["accumulation"].items():
        assert sum(plan["microbatch_sizes"]) == int(size)
        assert max(plan["microbatch_sizes"]) == plan["microbatch_size"] <= told["microbatch_limit"]
        assert plan["accumulation_steps"] == -(-int(size) // told["microbatch_limit"])
    parts = told["parts"]
    assert parts["weight_bytes"] == parts["gradient_bytes"] == 4 * told["num_parameters"]
    assert parts["optimizer_state_bytes"] == 8 * told["num_parameters"]
    activations = parts["microbatch_size"] * parts["activation_bytes_per_sample"]
    assert activations + parts["fixed_activation_bytes"] == parts["activation_bytes"]
    assert max(told["phase_peak_bytes"].values()) == told["peak_bytes"] <= told["usable_bytes"]
    assert parts["key_value_cache_bytes"] is None
    assert told["rule_of_thumb"]["batch_size"] == 256


def test_what_does_not_fit_is_an_answer_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *asked(memory="16GiB")) == 0
    shown = capsys.readouterr().out
    assert "Does not fit: one sample takes 21.5 GiB, 7.5 GiB more than there is." in shown
    assert "What would make it fit, one change at a time:" in shown
    assert "--method lora" in shown
    assert "Rule of thumb" not in shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "8b"}, "--model: unknown size '8b'; valid: 1b, 3b, 7b, 13b, 30b, 70b"),
        ({"task": "vqa"}, "--task: unknown name 'vqa'; valid: classification, generation, qa"),
        ({"method": "qlora"}, "--method: unknown name 'qlora'; valid: full, lora"),
        ({"precision": "fp8"}, "--precision: unknown name 'fp8'; valid: bf16, fp32"),
        ({"sharding": "zero"}, "--sharding: unknown name 'zero'; valid: none, optimizer, full"),
        ({"memory": "24"}, "--memory: '24' would be bytes; write the unit, such as 24GiB"),
        ({"memory": "much"}, "--memory: 'much' is not a size"),
        ({"lora_rank": "8"}, "--lora-rank 8 is for LoRA; add --method lora"),
    ],
)
def test_bad_input_is_one_error(
    options: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *asked(**options)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {told}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize("module", ["transformers", "peft"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # how Python itself notes that there is none
    assert call(monkeypatch, *asked()) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: the recommendation needs {module}, which this Python does not have; "
        "pip install 'tune-easytrain[lm]'\n"
    )
