"""The programs of docs/accumulation.md, and DDP by hand, lead to the full batch's weights."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_docs import read_blocks
from torch import nn

import tune_easytrain as te

TOLERANCE = 1e-12
MAX_NORM = 0.5
PROGRAMS = ("curve", "hand_loop", "whole_window", "fabric_loop", "accelerate_loop")
State = dict[str, Any]
Load = Callable[[str], ModuleType]

needs_fabric = pytest.mark.skipif(not find_spec("lightning_fabric"), reason="needs lightning-fabric")
needs_accelerate = pytest.mark.skipif(not find_spec("accelerate"), reason="needs accelerate")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs of the page."""
    folder = tmp_path_factory.mktemp("programs")
    for block in read_blocks("docs/accumulation.md"):
        if block.file_name is not None:
            (folder / block.file_name).write_text(block.text)
    assert {path.stem for path in folder.iterdir()} == set(PROGRAMS)
    return folder


@pytest.fixture
def load(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a program of the page."""
    monkeypatch.syspath_prepend(programs)
    yield importlib.import_module
    for name in PROGRAMS:
        sys.modules.pop(name, None)


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def full_batch(load: Load, double_precision: None) -> State:
    """The weights of the same training with every window in one batch, by torch alone."""
    curve = load("curve")
    inputs, targets = curve.make_data()
    model = curve.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = []
    for epoch in range(3):
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))
        for window in order.split(21):
            optimizer.zero_grad()
            curve.loss(model, (inputs[window], targets[window])).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
    assert min(norms) < MAX_NORM < max(norms)  # clipping, too, is put to the test
    state: State = model.state_dict()
    return state


@pytest.fixture
def new_accelerator() -> Iterator[Callable[..., Any]]:
    """Makes an Accelerator, whose state is the whole process's; it is forgotten after the test."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    yield partial(Accelerator, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def on_two_processes(programs: Path) -> dict[str, list[State]]:
    """The weights that every loop led to, on each of two processes."""
    names = ["by_hand", "averaged_by_ddp"]
    names += ["fabric"] if find_spec("lightning_fabric") else []
    names += ["accelerate"] if find_spec("accelerate") else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("accumulation_loops.py")), *names]
    environment = os.environ | {"PYTHONPATH": str(programs)}
    done = subprocess.run(command, cwd=programs, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: [torch.load(programs / f"{name}_{rank}.pt") for rank in range(2)] for name in names}


def distance(state: State, expected: State) -> float:
    """The largest relative difference of a parameter."""
    assert state.keys() == expected.keys()
    return max(float((state[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("microbatch_limit", [1, 6, 8, 21])
def test_the_loop_by_hand_is_exact(microbatch_limit: int, load: Load, full_batch: State) -> None:
    model = load("hand_loop").train(microbatch_limit=microbatch_limit)
    assert distance(model.state_dict(), full_batch) < TOLERANCE


@needs_fabric
@pytest.mark.parametrize("microbatch_limit", [6, 21])
def test_fabric_on_one_process_is_exact(microbatch_limit: int, load: Load, full_batch: State) -> None:
    program = load("fabric_loop")
    fabric = program.Fabric(accelerator="cpu", devices=1)
    model = program.train(fabric, microbatch_limit=microbatch_limit)
    assert distance(model.state_dict(), full_batch) < TOLERANCE


@needs_accelerate
@pytest.mark.parametrize("microbatch_limit", [6, 21])
def test_accelerate_on_one_process_is_exact(
    microbatch_limit: int, load: Load, full_batch: State, new_accelerator: Callable[..., Any]
) -> None:
    model = load("accelerate_loop").train(new_accelerator(), microbatch_limit=microbatch_limit)
    assert distance(model.state_dict(), full_batch) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "by_hand",
        pytest.param("fabric", marks=needs_fabric),
        pytest.param("accelerate", marks=needs_accelerate),
    ],
)
def test_two_processes_with_unequal_shares_are_exact(
    name: str, on_two_processes: dict[str, list[State]], full_batch: State
) -> None:
    for state in on_two_processes[name]:
        assert distance(state, full_batch) < TOLERANCE


def test_the_mean_that_ddp_takes_of_unequal_shares_lets_the_copies_drift_apart(
    on_two_processes: dict[str, list[State]],
) -> None:
    first, second = on_two_processes["averaged_by_ddp"]
    assert distance(first, second) > 1e-4


@needs_fabric
def test_fabric_in_mixed_precision_asks_for_its_backward(load: Load) -> None:
    from lightning_fabric import Fabric

    curve = load("curve")
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = fabric.setup(curve.build_model())
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        te.accumulate_gradients(model, curve.loss, [curve.make_data()])
    te.accumulate_gradients(model, curve.loss, [curve.make_data()], backward=fabric.backward)
    assert all(parameter.grad is not None for parameter in model.parameters())


@needs_fabric
def test_fabric_takes_its_loss_scale_off_before_clipping(load: Load) -> None:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    curve = load("curve")
    gradients = []
    for scale in (1.0, 256.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
        model = curve.build_model()
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        parts = te.split_batch(curve.make_data(), [20, 20, 3])
        te.accumulate_gradients(model, curve.loss, parts, backward=fabric.backward)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM, error_if_nonfinite=False)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert distance(gradients[1], gradients[0]) < 1e-2  # as near as half precision comes


@needs_accelerate
def test_accelerates_own_accumulation_would_divide_once_more(
    load: Load, new_accelerator: Callable[..., Any]
) -> None:
    curve = load("curve")
    model, whole = curve.build_model(), curve.build_model()
    curve.loss(whole, curve.make_data()).backward()
    accelerator = new_accelerator(gradient_accumulation_steps=4)
    te.accumulate_gradients(model, curve.loss, [curve.make_data()], backward=accelerator.backward)
    for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(4 * parameter.grad, expected.grad)
