"""The multi-crop example: its crops, its decoder, its data, what it learns, and its sweep over max_crops."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from example_files import load_example

import tune_easytrain as te

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]


crops = load_example("max_crops")


def tiny(**sections):
    config = {"model": {"type": "tiny", "max_crops": 4, "dim": 32}, "data": {"num_train": 64, "num_val": 32}}
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


@pytest.fixture
def model():
    torch.manual_seed(0)
    return crops.build_model(tiny()).eval()


def batch_of(indices, name="val", **sections):
    data = crops.Questions(tiny(**sections), name)
    return crops.collate([data[index] for index in indices])


def test_a_grid_has_the_shape_of_the_image_and_at_most_max_crops():
    for width, height in ((300, 100), (100, 300), (160, 160), (120, 90), (20, 20)):
        for most in range(1, 14):
            rows, columns = crops.choose_grid(width, height, 32, most)
            assert 1 <= rows * columns <= most
            assert crops.choose_grid(height, width, 32, most) == (columns, rows)
    assert crops.choose_grid(300, 100, 32, 12) == (2, 6)
    assert crops.choose_grid(100, 300, 32, 3) == (3, 1)
    assert crops.choose_grid(64, 32, 32, 12) == (1, 2)  # large enough: no more than needed
    assert crops.choose_grid(20, 20, 32, 12) == (1, 1)


def test_more_crops_shrink_an_image_less():
    scales = []
    for most in (1, 2, 4, 6, 9, 12):
        rows, columns = crops.choose_grid(128, 96, 32, most)
        scales.append(min(rows * 32 / 96, columns * 32 / 128))
    assert scales == sorted(set(scales))
    assert scales[-1] == 1


def test_crops_are_the_pieces_of_the_image_after_the_whole():
    from PIL import Image

    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8)
    image = Image.frombytes("RGB", (96, 64), bytes(pixels.flatten().tolist()))
    pieces = crops.cut(image, 32, 6)
    assert (pieces.shape, pieces.dtype) == ((7, 3, 32, 32), torch.uint8)
    assert torch.equal(pieces[1 + 1 * 3 + 2], pixels[32:, 64:].permute(2, 0, 1))
    assert pieces[0, :, 22:].max() == 0  # it keeps its shape, 32 x 21, and the rest is black
    assert pieces[0, :, :21].float().mean() > 100


def test_the_model_has_the_same_weights_for_every_max_crops():
    few, many = (crops.build_model(tiny(model={"max_crops": number})) for number in (2, 13))
    assert {k: v.shape for k, v in few.state_dict().items()} == {
        k: v.shape for k, v in many.state_dict().items()
    }


def test_shapes_of_logits_and_answers(model):
    batch = crops.worst_case(tiny(), 3)
    assert batch["crops"].shape == (3, 5, 3, 32, 32)
    logits = model(batch["crops"], batch["num_crops"], batch["question"], batch["answer"])
    assert logits.shape == (3, 5, crops.VOCABULARY_SIZE)
    assert crops.generate(model, batch, max_new_tokens=6).shape == (3, 6)
    for max_new_tokens in (1, 6):
        prediction, target = crops.predict(model, batch, max_new_tokens=max_new_tokens)
        assert prediction.shape == target.shape == (3, 5)


def test_no_sample_needs_more_than_the_worst_case():
    worst = crops.worst_case(tiny(), 32)
    for name in ("train", "val"):
        batch = batch_of(range(32), name)
        assert all(batch[key].shape[1] <= worst[key].shape[1] for key in ("crops", "question", "answer"))
    assert batch["question"].shape == worst["question"].shape
    assert batch["answer"].shape == worst["answer"].shape


@torch.no_grad()
def test_generation_with_a_cache_gives_the_words_of_the_decoder_without(model):
    batch = batch_of(range(16))
    answers = crops.generate(model, batch, max_new_tokens=5)
    without = torch.zeros(16, 0, dtype=torch.long)
    for _ in range(5):
        padded = torch.nn.functional.pad(without, (0, 1), value=crops.END)
        likeliest = model(batch["crops"], batch["num_crops"], batch["question"], padded)[:, -1].argmax(-1)
        ended = (without[:, -1:] == crops.END) | (without[:, -1:] == crops.PAD)
        word = torch.where(ended.any(1), crops.PAD, likeliest)
        without = torch.cat([without, word[:, None]], dim=1)
    assert torch.equal(answers, without)
    assert len(answers.unique()) > 2  # the answers are not all alike


@torch.no_grad()
def test_padding_changes_no_answer_and_no_logit(model):
    data = crops.Questions(tiny(), "val")
    batch = batch_of(range(16))
    assert batch["num_crops"].min() < batch["num_crops"].max()
    assert (batch["question"] == crops.PAD).any()
    logits = model(batch["crops"], batch["num_crops"], batch["question"], batch["answer"])
    answers = crops.generate(model, batch, max_new_tokens=4)
    for index in range(16):
        alone = crops.collate([data[index]])
        expected = model(alone["crops"], alone["num_crops"], alone["question"], alone["answer"])
        assert torch.allclose(logits[index, : expected.shape[1]], expected[0], atol=1e-5)
        assert torch.equal(crops.generate(model, alone, max_new_tokens=4)[0], answers[index])


@torch.no_grad()
def test_an_answer_depends_on_every_crop_and_on_the_question(model):
    batch = crops.worst_case(tiny(), 1)
    logits = model(batch["crops"], batch["num_crops"], batch["question"], batch["answer"])
    for key, place in (("crops", (0, 0)), ("crops", (0, 4)), ("question", (0, 0))):
        other = {**batch, key: batch[key].clone()}
        other[key][place] = crops.TOKENS["is"] if key == "question" else 255 - other[key][place]
        changed = model(other["crops"], other["num_crops"], other["question"], other["answer"])
        assert not torch.allclose(changed[:, 0], logits[:, 0], atol=1e-4)


def test_samples_are_a_function_of_their_number():
    one, other = (pickle.loads(pickle.dumps(crops.Questions(tiny(), "train"))) for _ in range(2))
    torch.manual_seed(5)
    for index in (3, 0, 63):
        assert all(torch.equal(one[index][key], other[index][key]) for key in one[index])
    assert not torch.equal(one[0]["crops"][0], one[1]["crops"][0])
    assert len(one) == 64
    with pytest.raises(IndexError):
        one[64]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_photo_is_in_two_sets(seed):
    sets = crops.split_photos(seed)
    assert not set(sets["train"]) & set(sets["val"])
    assert (len(sets["train"]), len(sets["val"])) == (11, 4)


def test_answers_are_what_the_question_asks_for():
    data = crops.Questions(tiny(), "val")
    asked = {}
    for index in range(32):
        question, answer = (crops.decode(data[index][key].tolist()) for key in ("question", "answer"))
        asked.setdefault(question, set()).add(answer)
    (word, _), (sentence, _) = crops.QUESTIONS["word"], crops.QUESTIONS["sentence"]
    assert set(asked) == {word, sentence}
    assert asked[word] <= set(crops.COLOURS)
    assert asked[sentence] <= {f"the mark is {colour}" for colour in crops.COLOURS}
    assert len(asked[word] | asked[sentence]) >= 8


def test_only_crops_show_a_small_mark():
    """The colour of a mark of 4 pixels is in the crops, and nearly never in the whole image made small."""
    whole, pieces = 0, 0
    data = crops.Questions({"data": {"marks": [4], "questions": ["word"], "num_val": 16}}, "val")
    for sample in (data[index] for index in range(16)):
        colour = torch.tensor(crops.COLOURS[crops.decode(sample["answer"].tolist())]).view(3, 1, 1)
        far = (sample["crops"].float() - colour).abs().amax(1).flatten(1).amin(1)
        whole += bool(far[0] < 40)
        pieces += bool(far[1:].min() < 40)
    assert pieces == 16
    assert whole < 4


def test_memory_rises_with_max_crops():
    def peak_bytes(number):
        estimate = te.estimate_memory(crops.build_task, tiny(model={"max_crops": number}), device="cpu")
        return estimate.peak_bytes(16)

    peaks = [peak_bytes(number) for number in (1, 4, 12)]
    assert peaks[0] < peaks[1] < peaks[2]
    assert peaks[2] > 2.5 * peaks[0]


def test_names_and_numbers_that_cannot_be_used_are_told(tmp_path):
    for sections, valid in (
        ({"model": {"typ": "tiny"}}, "type"),
        ({"model": {"type": "tinny"}}, "tiny"),
        ({"data": {"questions": ["sentense"]}}, "sentence"),
    ):
        with pytest.raises(te.UnknownNameError, match=f"did you mean '{valid}'"):
            crops.build_task(tiny(**sections))
    with pytest.raises(te.ConfigError) as caught:
        crops.build_task(tiny(model={"max_crops": 0, "heads": 1.5}, hp={"learning_rate": -1}))
    assert [fault.path for fault in caught.value.faults] == [
        "model.heads", "model.max_crops", "hp.learning_rate",
    ]  # fmt: skip
    with pytest.raises(te.ConfigError, match=r"model\.dim: 30 is no multiple of 2 x 4 heads"):
        crops.build_task(tiny(model={"dim": 30}))
    with pytest.raises(te.ConfigError, match=r"data\.marks: 60 cannot be used; give pixels from 1 to 55"):
        crops.build_task(tiny(data={"marks": [4, 60], "image_crops": 9}))
    with pytest.raises(te.DataError, match=r"model\.checkpoint: .* is not there"):
        crops.build_task(tiny(model={"checkpoint": str(tmp_path / "checkpoint.pt")}))


def test_weights_come_from_a_checkpoint_of_the_same_model(tmp_path):
    torch.manual_seed(1)
    path, trained = tmp_path / "checkpoint.pt", crops.build_model(tiny())
    torch.save({"model": trained.state_dict(), "epoch": 3}, path)
    loaded = crops.build_model(tiny(model={"checkpoint": str(path), "max_crops": 9}))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    with torch.device("meta"):
        assert next(crops.build_model(tiny(model={"checkpoint": str(path)})).parameters()).is_meta
    with pytest.raises(te.DataError, match="holds no weights of this model"):
        crops.build_model(tiny(model={"checkpoint": str(path), "dim": 64}))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(te.DataError, match="cannot be read"):
        crops.build_model(tiny(model={"checkpoint": str(path)}))


def test_packages_that_are_not_installed_are_told(monkeypatch):
    monkeypatch.setattr(crops, "find_spec", lambda name: None)
    with pytest.raises(te.DataError, match=r"pip install 'tune-easytrain\[iqa\]'"):
        crops.build_task(tiny()).train_data()


def run(folder, name, *overrides, **options):
    """Run a sweep file with overrides; returns the rows of its frame, and its results."""
    overrides = [f"run.storage={folder}", *overrides]
    results = te.run(ROOT / f"configs/{name}.yaml", overrides=overrides, quiet=True, **options)
    return results.frame().to_dict("records"), results


def test_training_raises_accuracy_and_its_weights_are_evaluated_along_the_knob(tmp_path):
    (trained,), results = run(tmp_path, "max_crops_train_demo", "train.epochs=3")
    assert trained["state"] == "finished"
    assert trained["val_accuracy_best"] > 0.5  # guessing is right in one of six
    path = results.checkpoints("trial_00000")[0].path
    rows, _ = run(
        tmp_path,
        "max_crops_train_demo",
        f"config.model.checkpoint={path}",
        "config.model.max_crops=null",
        "grid_search.grid.model.max_crops=[1, 2]",
        "batch={knob: model.max_crops, memory_budget: 256MiB}",
        "train={function: none}",
        debug=True,
    )
    assert [(row["model.max_crops"], row["state"]) for row in rows] == [(1, "finished"), (2, "finished")]
    assert rows[1]["val_accuracy_last"] == pytest.approx(trained["val_accuracy_last"], abs=0.02)


def test_the_demo_finds_each_value_a_size_of_its_own(tmp_path):
    rows, _ = run(tmp_path, "max_crops_demo", "batch.start_from=12", max_experiments=1)
    (row,) = rows
    assert (row["model.max_crops"], row["state"], row["probe_rule_of_thumb"]) == (12, "finished", 19)
    assert 9 <= row["microbatch_size"] < 42  # more than 19 // 2 fit into 128 MiB, and not twice 19
    assert row["probe_attempts"] > 1


@pytest.mark.parametrize("name", ["max_crops", "max_crops_demo", "max_crops_train_demo"])
def test_the_sweep_files_are_valid(name):
    config = te.load_config(ROOT / f"configs/{name}.yaml")
    for trial in te.expand_trials(config):
        assert crops.build_task(trial).generate is not None
    if name == "max_crops":
        values = [trial["model"]["max_crops"] for trial in te.expand_trials(config)]
        assert values == list(range(2, 14))
