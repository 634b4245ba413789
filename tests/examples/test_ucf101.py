"""The UCF101 example: its nine models, its config, and what it says where something is missing."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from example_files import load_example

from tune_easytrain.errors import ConfigError, DataError, UnknownNameError

ROOT = Path(__file__).parents[2]


ucf101 = load_example("ucf101")
MODELS = list(ucf101.FRAMES)


def small(name="r3d_18", **sections):
    config = {"model": {"type": name}, "data": {"frames": 8, "size": 32, "num_classes": 5}}
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


@pytest.mark.parametrize("name", MODELS)
def test_each_model_builds_without_storage_at_full_size(name):
    task = ucf101.build_task({"model": {"type": name}})
    with torch.device("meta"):
        model = task.model()
    frames, size = (32 if name.startswith("swin") else 16), (112 if name.endswith("_18") else 224)
    clip = ucf101.clip_format({"model": {"type": name}})
    assert (clip.num_frames, clip.size, clip.is_published) == (frames, size, True)
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta"):
        assert model(torch.empty(1, 3, frames, size, size)).shape == (1, 101)


@pytest.mark.parametrize("name", MODELS)
def test_each_model_runs_at_small_input(name):
    task = ucf101.build_task(small(name))
    model = task.model().eval()
    with torch.no_grad():
        batch = task.worst_case(2)
        assert batch[0].shape == (2, 3, 8, 32, 32)
        logits, labels = task.predict(model, batch)
        assert logits.shape == (2, 5)
        metric = task.metrics["accuracy"]()
        metric.update(logits, labels)
        assert 0 <= metric.compute() <= 1
        assert task.loss(model, batch).isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_weights_get_a_new_head_where_the_old_one_was(name):
    from torchvision.models import get_model

    with torch.device("meta"):
        model = get_model(name, weights=None)
        ucf101.replace_head(name, model, 7)
        expected = get_model(name, weights=None, num_classes=7)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in expected.state_dict().items()}
    with torch.device("meta"):  # nothing is downloaded
        ucf101.build_task({"model": {"type": name, "weights": "DEFAULT"}}).model()


def test_the_worst_case_works_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        clips, labels = ucf101.build_task(small()).worst_case(3)
    assert (clips.shape, labels.shape) == ((3, 3, 8, 32, 32), (3,))


def test_the_built_in_sweep_is_the_file():
    assert yaml.safe_load((ROOT / "configs/ucf101_video_grid.yaml").read_text()) == ucf101.DEFAULT_SWEEP


def test_the_demo_names_all_nine():
    grid = yaml.safe_load((ROOT / "configs/ucf101_demo.yaml").read_text())["grid_search"]["grid"]
    assert grid["model.type"] == MODELS
    assert len(grid["hp.batch_size"]) == 9


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"type": "r3d18"}}, r"model\.type: unknown name 'r3d18'; did you mean 'r3d_18'"),
        ({"model": {"type": None}}, r"model\.type"),
        ({"model": {"weights": "KINETICS"}}, r"model\.weights: .*KINETICS400_V1"),
        ({"optimizer": {"name": "adamax"}}, r"optimizer\.name: unknown name 'adamax'"),
        ({"optimizer": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"data": {"sizes": 3}}, "data: unknown name 'sizes'; did you mean 'size'"),
        ({"data": {"sampling": "random"}}, r"data\.sampling"),
        ({"data": {"split": 4}}, r"data\.split"),
        ({"data": {"decoder": "decord"}}, r"data\.decoder"),
    ],
)
def test_unknown_names(sections, message):
    with pytest.raises(UnknownNameError, match=message):
        ucf101.build_task(small(**sections))


def test_all_wrong_numbers_are_told_at_once():
    config = small(data={"frames": 0, "size": "big"}, hp={"learning_rate": -1}, optimizer={"momentum": 0.9})
    with pytest.raises(ConfigError) as caught:
        ucf101.build_task(config)
    paths = [fault.path for fault in caught.value.faults]
    assert paths == ["data.frames", "data.size", "hp.learning_rate", "optimizer.momentum"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("s3d", {"frames": 4}, r"data\.frames: 4 .* at least 5"),
        ("mvit_v2_s", {"size": 30}, r"data\.size: 30 .* at least 32, a multiple of 4"),
        ("mvit_v1_b", {"frames": 7}, r"data\.frames: 7 .* multiple of 2"),
    ],
)
def test_input_that_a_model_cannot_take(name, data, message):
    with pytest.raises(ConfigError, match=message):
        ucf101.build_task(small(name, data=data))


def test_mvit_weights_need_their_own_input():
    with pytest.raises(ConfigError, match=r"leave data\.frames and data\.size out"):
        ucf101.build_task(small("mvit_v2_s", model={"weights": "DEFAULT"}))


def test_optimizers_take_their_options():
    model = torch.nn.Linear(2, 2)
    for name, kind in (("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")):
        config = small(optimizer={"name": name, "weight_decay": 0.1}, hp={"learning_rate": 0.5})
        if name == "sgd":
            config["optimizer"]["momentum"] = 0.9
        optimizer = ucf101.build_task(config).optimizer(model)
        assert type(optimizer).__name__ == kind
        assert optimizer.defaults["lr"] == 0.5
        assert optimizer.defaults["weight_decay"] == 0.1
    assert optimizer.defaults["momentum"] == 0.9


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("demo") / "data"
    load_example("make_demo_data").make_demo_data(folder)
    return folder


@pytest.mark.parametrize("train", [{"epochs": 2}, {"num_samples": 36 + 31}, {"num_steps": 8}])
def test_the_data_of_the_demo(demo_data, train):
    config = small(data={"root": str(demo_data)}, optimizer={"schedule": "cosine"})
    config |= {"train": train, "batch": {"effective_batch_size": 10}}
    task = ucf101.build_task(config)
    train, validation = task.train_data(), task.val_data()
    assert (len(train), len(validation)) == (36, 12)
    clip, label = pickle.loads(pickle.dumps(train))[0]
    assert (clip.shape, clip.dtype, label) == ((3, 8, 32, 32), torch.float32, 0)
    assert abs(float(clip.mean())) < 2  # normalised
    with torch.device("meta"):
        model = task.model()
    assert model.fc.out_features == 4  # classInd.txt counts, not data.num_classes
    optimizer = task.optimizer(torch.nn.Linear(2, 2))
    scheduler = task.scheduler(optimizer)
    for _ in range(8):  # ceil(36 / 10) steps an epoch
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0)


def test_loader_processes_decode_the_same_clips(demo_data):
    from tune_easytrain.batch_plan import BatchPlan
    from tune_easytrain.loader import EpochLoader

    task = ucf101.build_task(small(data={"root": str(demo_data), "sampling": "consecutive"}))
    data, plan = task.train_data(), BatchPlan.build(10, 4)

    def read(num_workers):
        loader = EpochLoader(task, data, torch.device("cpu"), seed=0, num_workers=num_workers)
        epochs = [loader.windows(10, epoch) for epoch in (0, 1)]
        return [batch for windows in epochs for k in range(len(windows)) for batch in windows.read(k, plan)]

    batches = read(2)
    assert sum(len(labels) for _, labels in batches) == 2 * 36
    for (clips, labels), (expected_clips, expected_labels) in zip(batches, read(0), strict=True):
        assert torch.equal(clips, expected_clips)
        assert torch.equal(labels, expected_labels)


def test_full_size_clips_are_the_published_transform(demo_data):
    from torchvision.models.video import S3D_Weights

    from tune_easytrain.video import decode_clip

    data = ucf101.build_task({"model": {"type": "s3d"}, "data": {"root": str(demo_data)}}).val_data()
    path = demo_data / "UCF-101/BigBuckBunny/v_BigBuckBunny_g04_c01.avi"
    assert torch.equal(data[0][0], S3D_Weights.DEFAULT.transforms()(decode_clip(path, 16)))


def test_a_decoder_that_is_not_installed_is_told_before_anything_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(DataError, match=r"data\.decoder: .*pip install 'tune-easytrain\[torchcodec\]'"):
        ucf101.build_task(small(data={"decoder": "torchcodec"}))


def test_data_without_a_root():
    with pytest.raises(DataError, match="--data-root"):
        ucf101.build_task(small()).train_data()


def run_alone(tmp_path, *arguments, **environment):
    """Run a copy of the one file, from elsewhere, as `ray submit` does."""
    script = tmp_path / "script.py"
    script.write_text((ROOT / "examples/ucf101.py").read_text())
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("by_option", [True, False])
def test_a_missing_data_root_is_exit_code_2_and_says_how_to_set_it(tmp_path, by_option):
    missing = str(tmp_path / "nowhere")
    arguments, environment = (("--data-root", missing), {}) if by_option else ((), {"UCF101_ROOT": missing})
    result = run_alone(tmp_path, *arguments, **environment)
    assert result.returncode == 2
    assert "nowhere: no such folder" in result.stderr
    assert "UCF101_ROOT" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_options_become_overrides(demo_data, monkeypatch):
    monkeypatch.delenv("UCF101_ROOT", raising=False)
    monkeypatch.delenv("TUNE_EASYTRAIN_STORAGE", raising=False)
    monkeypatch.chdir(demo_data.parent)
    options = ucf101.parse_arguments(["--data-root", "data", "--storage", "/runs", "--set", "train.epochs=1"])
    overrides = ucf101.choose_overrides(options)
    assert overrides[1:] == ["run.storage=/runs", "train.epochs=1", f"config.data.root={demo_data}"]
    ucf101.check_data(overrides, options)
