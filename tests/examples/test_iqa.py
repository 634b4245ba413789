"""The image-quality example: its data, its loss under accumulation, its models, and what it says is wrong."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from example_files import load_example

import tune_easytrain as te
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.loader import EpochLoader

ROOT = Path(__file__).parents[2]


iqa = load_example("iqa")


def small(**sections):
    config = {
        "model": {"type": "small_cnn", "dropout": 0.0},
        "data": {"crops": 4, "size": 32, "resize": 64},
        "hp": {"learning_rate": 3e-3},
        "batch": {"effective_batch_size": 16},
        "train": {"epochs": 1},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def photo_names(images):
    return {image.name.partition("/")[0] for image in images}


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_photo_is_in_two_sets(seed):
    pytest.importorskip("skimage")
    config = {"data": {"split": seed, "resize": 64}}
    training, validation = (iqa.load_set(config, name) for name in ("training", "validation"))
    assert (len(training), len(validation)) == (12 * 21, 4 * 21)
    assert not photo_names(training) & photo_names(validation)
    assert sorted({image.score for image in training}) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert photo_names(validation) == photo_names(iqa.load_set(config, "validation"))


def test_what_people_have_not_rated_is_called_severity():
    text = (ROOT / "examples/iqa.py").read_text()
    parts = text[text.index("def load_distorted") : text.index("HOW_TO_SET_ROOT = (")]
    assert not {"opinion", "MOS", "quality score"} & set(parts.split())
    assert "*severity* of the distortion, 0 … 1, which is nobody's opinion" in text


def test_distortions_are_graded_and_the_same_each_time():
    pytest.importorskip("skimage")
    path = next(path for path in iqa.find_photos() if path.stem == "astronaut")
    first, again = iqa.DistortedPhotos(64), iqa.DistortedPhotos(64)
    original = first.read(path, "none", 0).float()
    for kind in iqa.DISTORTIONS:
        errors = []
        for level in range(1, 6):
            assert torch.equal(first.read(path, kind, level), again.read(path, kind, level))
            errors.append(float((first.read(path, kind, level) - original).abs().mean()))
        assert errors == sorted(errors)
        assert errors[0] > 0


@pytest.mark.parametrize(("per_sample", "num_samples"), [(4, 252), (1, 1008), (2, 504)])
def test_every_image_gives_its_crops_in_training(per_sample, num_samples):
    pytest.importorskip("skimage")
    task = iqa.build_task(small(data={"crops_per_sample": per_sample}))
    data = pickle.loads(pickle.dumps(task.train_data()))
    crops, score, number = data[num_samples - 1]
    assert (len(data), crops.shape, crops.dtype) == (num_samples, (per_sample, 3, 32, 32), torch.uint8)
    assert (score.dtype, number) == (torch.float32, 0)
    assert task.val_data()[0][0].shape == (4, 3, 32, 32)  # in testing always all at once


def test_crops_are_a_function_of_seed_epoch_and_sample():
    pytest.importorskip("skimage")
    task = iqa.build_task(small())
    data = task.train_data()

    def read(limit, seed, epoch, num_workers=0):
        loader = EpochLoader(task, data, torch.device("cpu"), seed=seed, num_workers=num_workers)
        windows, plan = loader.windows(16, epoch), BatchPlan.build(16, limit)
        return torch.cat([batch[0] for batch in windows.read(0, plan)])

    assert torch.equal(read(16, 0, 0), read(5, 0, 0))
    assert torch.equal(read(16, 0, 0), read(5, 0, 0, num_workers=2))
    assert not torch.equal(read(16, 0, 0), read(16, 0, 1))
    assert not torch.equal(read(16, 0, 0), read(16, 1, 0))


def write_koniq(folder, num_images, *, sets=None, top=100, size=(80, 60)):
    """Write KonIQ-10k's files with random images, in the columns and names of the original."""
    from PIL import Image

    (folder / "512x384").mkdir(parents=True)
    named = [f"{number:04}.jpg" for number in range(num_images)]
    header = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD" + (",set" if sets else ",MOS_zscore")
    lines = [header]
    for number, name in enumerate(named):
        low = 1 if top == 5 else 0
        mos = low + (top - low) * number / (num_images - 1)
        lines.append(f"{name},1,2,3,4,5,15,{mos},0.5,{sets[number % len(sets)] if sets else 55.5}")
        level = torch.full((size[1], size[0], 3), 2 * number, dtype=torch.uint8)
        Image.fromarray(level.numpy()).save(folder / "512x384" / name)
    file = "koniq10k_distributions_sets.csv" if sets else "koniq10k_scores_and_distributions.csv"
    (folder / file).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("top", [5, 100])
def test_koniq_by_its_own_split_or_a_seeded_one(tmp_path, top):
    given = write_koniq(tmp_path / "a", 20, sets=["training", "training", "test", "validation"], top=top)
    seeded = write_koniq(tmp_path / "b", 20, top=top)
    for root, sizes in ((given, [10, 5, 5]), (seeded, [14, 2, 4])):
        config = small(data={"root": str(root)})
        sets = [iqa.load_set(config, name) for name in iqa.SETS]
        assert [len(images) for images in sets] == sizes
        scores = {image.name: image.score for images in sets for image in images}
        assert len(scores) == 20
        assert scores["0000.jpg"] == 0
        assert scores["0019.jpg"] == 1
        assert scores["0010.jpg"] == pytest.approx(10 / 19)
        assert sets[0][0].read().shape == (3, 64, 85)
    other = iqa.load_set(small(data={"root": str(seeded), "split": 3}), "training")
    assert photo_names(other) != photo_names(iqa.load_set(small(data={"root": str(seeded)}), "training"))


def write_spaq(folder):
    write_koniq(folder / "raw", 12)
    (folder / "raw/512x384").rename(folder / "TestImage")
    (folder / "Annotations").mkdir()
    rows = "".join(f"{number:04}.jpg,{99 - number},1,2,3,4,5\n" for number in range(12))
    header = "Image name,MOS,Brightness,Colorfulness,Contrast,Noisiness,Sharpness\n"
    (folder / "Annotations/MOS and Image attribute scores.csv").write_text(header + rows)
    return folder


def test_each_evaluated_set_has_metrics_of_its_own_and_the_first_the_loss(tmp_path):
    from scipy.stats import pearsonr, spearmanr

    koniq = write_koniq(tmp_path / "koniq", 40, sets=["training", "test", "validation", "training"])
    config = small(data={"root": str(koniq), "second_test_root": str(write_spaq(tmp_path / "spaq"))})
    task = iqa.build_task(config)
    data = task.val_data()
    assert [len(part) for part in data.datasets] == [10, 10, 12]
    model = task.model().eval()
    metrics = {name: build() for name, build in task.metrics.items()}
    loader = EpochLoader(task, data, torch.device("cpu"), seed=0, num_workers=0)
    counted = 0
    targets = []
    with torch.no_grad():
        for batch in loader.in_order(7):  # batches that hold two sets
            prediction, target = task.predict(model, batch)
            targets.append(torch.cat([prediction[:, None], target], dim=1))
            for metric in metrics.values():
                metric.update(prediction, target)
            counted += task.weight(batch)
    rows = torch.cat(targets)
    expected = {}
    for number, prefix in enumerate(("", "test_", "spaq_")):
        predicted, scores, _ = rows[rows[:, 2] == number].T
        expected[f"{prefix}srcc"] = spearmanr(predicted, scores).statistic
        expected[f"{prefix}plcc"] = pearsonr(predicted, scores).statistic
    assert {name: float(metric.compute()) for name, metric in metrics.items()} == pytest.approx(
        expected, abs=1e-4
    )
    assert counted == 10
    squared = iqa.build_task(small(data=config["data"], loss={"ranking_alpha": 0}))
    with torch.no_grad():
        parts = [(task.weight(batch), squared.loss(model, batch)) for batch in loader.in_order(7)]
    mean = sum(weight * value for weight, value in parts if weight) / counted
    first = rows[rows[:, 2] == 0]
    assert float(mean) == pytest.approx(float(((first[:, 0] - first[:, 1]) ** 2).mean()), rel=1e-5)


def pairs_by_hand(predicted, scores, group):
    """The ranking loss of the docstring, pair by pair."""
    losses = []
    for i, y in enumerate(scores):
        partners = [j for j in range(len(scores)) if j != i and (group is None or j // group == i // group)]
        each = [
            max(0, abs(y - scores[j]) - (1 if y > scores[j] else -1) * (predicted[i] - predicted[j]))
            if y != scores[j]
            else 0
            for j in partners
        ]
        losses.append(sum(each) / len(each) if each else 0)
    return losses


@pytest.mark.parametrize("group", [None, 4, 3])
@pytest.mark.parametrize("num_samples", [1, 2, 7])
def test_the_ranking_loss_is_a_mean_over_partners(group, num_samples):
    generator = torch.Generator().manual_seed(num_samples)
    predicted = torch.rand(num_samples, generator=generator, dtype=torch.float64)
    scores = torch.randint(0, 4, (num_samples,), generator=generator).double() / 3
    found = iqa.ranking_loss(predicted, scores, torch.ones_like(scores), group)
    assert found.tolist() == pytest.approx(pairs_by_hand(predicted.tolist(), scores.tolist(), group))


def gradients(group, sizes, num_samples=64):
    torch.manual_seed(0)
    task = iqa.build_task(small(loss={"ranking_group": group}))
    model = task.model().double()
    generator = torch.Generator().manual_seed(1)
    batch = (
        torch.randint(0, 256, (num_samples, 2, 3, 16, 16), generator=generator, dtype=torch.uint8),
        torch.rand(num_samples, generator=generator, dtype=torch.float64),
        torch.zeros(num_samples, dtype=torch.long),
    )
    te.accumulate_gradients(model, task.loss, te.split_batch(batch, sizes))
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("group", "sizes", "is_exact"),
    [
        (8, (32, 32), True),
        (8, BatchPlan.build(64, 30, group_size=8).microbatch_sizes, True),
        (8, (28, 36), False),
        (None, (32, 32), False),
        (None, (64,), True),
    ],
)
def test_accumulation_is_exact_where_no_pair_is_divided(group, sizes, is_exact):
    whole, parts = gradients(group, (64,)), gradients(group, sizes)
    difference = float((whole - parts).norm() / whole.norm())
    assert (difference < 1e-6) is is_exact


def test_the_loss_of_a_short_last_window_is_exact_too():
    sizes = BatchPlan.build(64, 32, group_size=8).for_window(38).microbatch_sizes
    assert sizes == (24, 14)
    assert gradients(8, sizes, 38) == pytest.approx(gradients(8, (38,), 38), rel=1e-6, abs=1e-12)


def test_without_groups_the_gradient_has_the_same_mean():
    """Over all ways to part four samples into twos, the mean of the parts' losses is the whole's."""
    predicted, scores = torch.tensor([0.1, 0.9, 0.3, 0.4]), torch.tensor([0.0, 0.5, 1.0, 0.2])
    parted = [
        iqa.ranking_loss(predicted[list(pair)], scores[list(pair)], torch.ones(2), None).mean()
        for pair in itertools.combinations(range(4), 2)
    ]
    whole = iqa.ranking_loss(predicted, scores, torch.ones(4), None).mean()
    assert float(torch.stack(parted).mean()) == pytest.approx(float(whole))


def test_the_task_says_what_its_loss_compares():
    kinds = [({}, True), ({"ranking_group": 8}, 8), ({"ranking_alpha": 0}, False)]
    assert [iqa.build_task(small(loss=values)).couples_samples for values, _ in kinds] == [
        kind for _, kind in kinds
    ]


@pytest.mark.parametrize(
    ("config", "num_samples", "steps"),
    [
        ({"batch": {"effective_batch_size": 32}}, 7046, 221),
        ({"batch": {"effective_batch_size": 32}}, 7046 * 20, 4404),
        ({"batch": {"effective_batch_size": 64}, "train": {"epochs": 30}}, 7046, 30 * 111),
        ({"hp": {"batch_size": 48}, "train": {"epochs": 2}}, 7046, 2 * 147),
        ({"batch": {"effective_batch_size": 32}, "train": {"num_samples": 7046 + 33}}, 7046, 223),
        ({"train": {"num_steps": 500}}, 7046, 500),
    ],
)
def test_steps_of_a_training(config, num_samples, steps):
    assert iqa.num_steps(config, num_samples) == steps


def test_the_cosine_ends_at_zero():
    pytest.importorskip("skimage")
    task = iqa.build_task(small(train={"epochs": 2}))
    optimizer = task.optimizer(torch.nn.Linear(2, 2))
    scheduler = task.scheduler(optimizer)
    for _ in range(2 * 16):  # ceil(252 / 16) steps an epoch
        assert scheduler.get_last_lr()[0] > 0
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0)
    assert iqa.build_task(small(optimizer={"schedule": "constant"})).scheduler is None


@pytest.mark.parametrize("name", list(iqa.SWINS))
def test_swin_is_torchvisions_with_the_rates_asked_for(name):
    from torchvision.models import get_model
    from torchvision.ops import StochasticDepth

    config = {"model": {"type": name, "drop_path": 0.3, "dropout": 0.4}}
    with torch.device("meta"):
        scorer, published = iqa.build_task(config).model().scorer, get_model(name, weights=None)
        assert iqa.build_task(config).model()(torch.empty(2, 3, 3, 224, 224)).shape == (2,)
    shapes = {key: value.shape for key, value in scorer.state_dict().items() if "head" not in key}
    expected = {key: value.shape for key, value in published.state_dict().items() if "head" not in key}
    assert shapes == expected
    rates = [module.p for module in scorer.modules() if isinstance(module, StochasticDepth)]
    assert (rates[0], rates[-1], scorer.head[0].p) == (0, pytest.approx(0.3), 0.4)


def test_pretrained_weights_are_used_all_but_the_head(monkeypatch):
    from torchvision.models import Swin_T_Weights, get_model

    published = get_model("swin_t", weights=None).state_dict()
    monkeypatch.setattr(Swin_T_Weights, "get_state_dict", lambda self, **options: published)
    model = iqa.build_task({"model": {"type": "swin_t", "pretrained": True}}).model().scorer
    for key, value in model.state_dict().items():
        assert "head" in key or torch.equal(value, published[key])
    assert model.head[1].out_features == 1


def test_weights_that_cannot_be_fetched_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torchvision.models.Swin_T_Weights.DEFAULT.value.url", "http://127.0.0.1:9/w.pth", raising=False
    )
    with pytest.raises(
        te.DataError, match=r"model\.pretrained: .* cannot be fetched from http://127.*set model\.pretr"
    ):
        iqa.build_task({"model": {"type": "swin_t", "pretrained": True}}).model()


def test_the_crops_of_an_image_need_the_activations_of_one():
    """What keeps 20 crops of 32 images on one GPU: they pass through the model one after another."""
    one, many = (
        te.estimate_memory(iqa.build_task, small(data={"crops": crops, "size": 64})).peak_bytes(8)
        for crops in (1, 16)
    )
    inputs = 8 * 15 * 3 * 64 * 64
    assert many < 1.5 * one + 2 * inputs


def test_an_image_is_scored_by_the_mean_over_its_crops_and_so_is_its_gradient():
    torch.manual_seed(0)
    model = iqa.build_task(small()).model()
    crops = torch.randint(0, 256, (2, 5, 3, 32, 32), dtype=torch.uint8)
    single = torch.stack([model(crops[:, k : k + 1]) for k in range(5)]).mean(0)
    assert torch.allclose(model(crops), single, atol=1e-6)
    found = torch.autograd.grad(model(crops).sum(), model.parameters())
    for gradient, expected in zip(found, torch.autograd.grad(single.sum(), model.parameters()), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-5)


def test_the_built_in_sweep_is_the_file():
    assert yaml.safe_load((ROOT / "configs/iqa_batch_study.yaml").read_text()) == iqa.DEFAULT_SWEEP


def test_the_study_is_the_one_asked_for():
    config = te.load_config(ROOT / "configs/iqa_batch_study.yaml")
    trials = te.expand_trials(config)
    found = [(t["batch"]["effective_batch_size"], t["hp"]["batch_size"], t["train"]["seed"]) for t in trials]
    pairs = [(24, 24), (32, 32), (48, 48), (64, 64), (64, 32)]
    assert found == [(*pair, seed) for pair in pairs for seed in (0, 1, 2)]
    train = config.train
    assert (train.epochs, train.patience, train.lr_scaling, train.base_batch_size) == (30, 7, "sqrt", 32)
    from tune_easytrain.learning_rate import rate_factor

    rate = trials[0]["hp"]["learning_rate"]
    assert rate == 5e-6
    assert round(rate * rate_factor("sqrt", 48, 32), 7) == 6.1e-6
    quick = te.expand_trials(te.load_config(ROOT / "configs/iqa_batch_study.yaml", quick=True))
    assert {(t["model"]["type"], t["train"]["epochs"], t["data"]["share"]) for t in quick} == {
        ("swin_t", 10, 0.1)
    }
    assert len(quick) == 5


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"type": "swin"}}, r"model\.type: unknown name 'swin'; did you mean 'swin_t'"),
        ({"model": {"type": None}}, r"model\.type"),
        ({"data": {"crop": 3}}, "data: unknown name 'crop'; did you mean 'crops'"),
        ({"optimizer": {"schedule": "cosin"}}, "did you mean 'cosine'"),
    ],
)
def test_unknown_names(sections, message):
    with pytest.raises(te.UnknownNameError, match=message):
        iqa.build_task(small(**sections))


def test_all_wrong_numbers_are_told_at_once():
    wrong = {
        "data": {"crops": 0, "size": "big", "share": 1.5, "second_test_root": 5},
        "model": {"drop_path": 1.0, "pretrained": "yes"},
        "loss": {"ranking_group": 1},
        "hp": {"learning_rate": -1},
    }
    with pytest.raises(te.ConfigError) as caught:
        iqa.build_task(small(**wrong))
    assert [fault.path for fault in caught.value.faults] == [
        "data.crops", "data.size", "loss.ranking_group", "model.drop_path", "data.share", "hp.learning_rate",
        "data.second_test_root", "model.pretrained", "data.second_test_root",
    ]  # fmt: skip
    for data, message in (
        ({"crops_per_sample": 3}, r"data\.crops_per_sample: 3 does not divide data\.crops: 4"),
        ({"size": 65}, r"data\.size: 65 is more than the images have"),
    ):
        with pytest.raises(te.ConfigError, match=message):
            iqa.build_task(small(data=data))


def test_data_that_are_not_as_they_should_be_are_told(tmp_path):
    config = small(data={"root": str(tmp_path / "koniq")})

    def told():
        with pytest.raises(te.DataError) as caught:
            iqa.build_task(config).train_data()
        return str(caught.value)

    assert "there is no koniq10k_distributions_sets.csv or koniq10k_scores_and" in told()
    root = write_koniq(tmp_path / "koniq", 20)
    missing = iqa.load_set(config, "training")[0].name
    (root / "512x384" / missing).unlink()
    sheet = root / "koniq10k_scores_and_distributions.csv"
    text = sheet.read_text()
    assert f"1 of 14 images are not there, such as {missing}" in told()
    sheet.write_text(text.replace("MOS,", "score,"))
    assert "has no column 'MOS'" in told()
    sheet.write_text(text.replace(",100.0,", ",many,"))
    assert "koniq10k_scores_and_distributions.csv:21: MOS is 'many', no number from 0 to 100" in told()
    sheet.write_bytes(b"image_name,MOS\n\xff\xfe,3\n")
    assert "cannot be read" in told()
    (root / "512x384").rename(root / "other")
    assert "has no folder 512x384 or 1024x768" in told()


def test_an_image_that_is_none_is_told(tmp_path):
    root = write_koniq(tmp_path / "koniq", 20)
    for file in (root / "512x384").iterdir():
        file.write_bytes(b"no image")
    data = iqa.build_task(small(data={"root": str(root)})).train_data()
    with pytest.raises(te.DataError, match=r"512x384/\d+\.jpg: no image that can be read"):
        data[0]


def test_packages_that_are_not_installed_are_told(monkeypatch):
    monkeypatch.setattr(iqa, "find_spec", lambda name: None)
    with pytest.raises(
        te.DataError, match=r"pip install 'tune-easytrain\[iqa\]', or give KonIQ-10k's folder"
    ):
        iqa.build_task(small()).train_data()


def test_the_demo_learns_severity(tmp_path):
    """A third of the demo's training: it ranks distortions of photos that it has not seen."""
    pytest.importorskip("skimage")
    results = te.run(
        ROOT / "configs/iqa_demo.yaml",
        overrides=[f"run.storage={tmp_path}", "train.epochs=4"],
        max_experiments=1,
        debug=True,
        quiet=True,
    )
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["effective_batch_size"]) == ("finished", 16)
    assert row["val_srcc_best"] > 0.3


def test_exactness_that_is_required_refuses_pairs_between_micro_batches(tmp_path):
    pytest.importorskip("skimage")
    results = te.run(
        ROOT / "configs/iqa_demo.yaml",
        overrides=[
            f"run.storage={tmp_path}",
            "config.data.share=0.2",
            "train.epochs=1",
            "grid_search={grid: {loss.ranking_group: [8, null], hp.batch_size: [16]}}",
            "batch.effective_batch_size=32",
        ],
        debug=True,
        quiet=True,
    )
    grouped, whole = results.frame().to_dict("records")
    assert (grouped["state"], grouped["microbatch_size"], grouped["accumulation_steps"]) == (
        "finished",
        16,
        2,
    )
    assert whole["state"] == "failed"
    assert "InexactBatchError: batch.exact: required" in whole["error"]


def test_a_copy_of_the_file_runs_alone(tmp_path):
    """As `ray submit` copies it: what it lacks is exit code 2, with the way to give it."""
    script = tmp_path / "script.py"
    script.write_text((ROOT / "examples/iqa.py").read_text())
    for more, told in (
        ([], "nowhere: there is no koniq10k_distributions_sets.csv or koniq10k_scores_and"),
        (["--set", "train.epoch=3"], "--set: train.epoch: unknown key 'epoch'"),
    ):
        done = subprocess.run(
            [sys.executable, str(script), "--data-root", "nowhere", "--quick", *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    options = iqa.parse_arguments(["--data-root", "here", "--storage", "/runs", "--set", "train.epochs=1"])
    assert iqa.choose_overrides(options) == [
        f"config.data.root={Path('here').absolute()}", "run.storage=/runs", "train.epochs=1",
    ]  # fmt: skip
