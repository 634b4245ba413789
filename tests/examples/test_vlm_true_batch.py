"""The vision-language example: true batches equal samples one by one, and what it says is wrong."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from toys import make_settings

import tune_easytrain as te
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.checkpointing import apply_checkpointing
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.loader import EpochLoader
from tune_easytrain.protocol import PlanChanged, Report
from tune_easytrain.task_source import load_function, pickle_function
from tune_easytrain.trial_context import TrialContext

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import vlm_adversarial
import vlm_model
import vlm_questions
import vlm_true_batch as vlm

pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]

adversarial_loss = vlm_adversarial.adversarial_loss

FEWER = ({}, {"merge_keep": 0.6}, {"prune_layers": [1, 2]}, {"merge_keep": 0.7, "prune_layers": [0, 2]})
SOURCE_KEYS = {"mllm_settings": {"enable_true_batch": True, "unified_image_size": 28}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tiny(is_true_batch=True, **sections):
    config = {
        "model": {"enable_true_batch": is_true_batch},
        "data": {"num_samples": 16},
        "hp": {"learning_rate": 3e-3},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def read_batch(config, num_samples, name="training"):
    data = vlm.open_questions(config, name)
    return vlm.collate([data[index] for index in range(num_samples)])


def build(config, dtype=torch.float64):
    torch.manual_seed(0)
    build_one = vlm.build_adversarial if config.get("loss") else vlm.build_model
    return build_one(config).to(dtype)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def difference(one, other):
    """The largest difference of two sets of gradients, as a part of the largest gradient."""
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert largest > 1e-3
    return max(float((one[name] - other[name]).abs().max()) for name in one) / largest


# What the model computes


def test_it_is_transformers_llava():
    """Placeholders are replaced, and answers predicted, as by LlavaForConditionalGeneration itself."""
    config = tiny(model={"unified_image_size": 56})
    model, batch = build(config), read_batch(config, 5)
    pixels = (batch["pixels"] - model.mean) / model.std
    logits = model.llava(
        input_ids=batch["input_ids"], pixel_values=pixels, attention_mask=batch["attention_mask"]
    ).logits
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    targets = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=vlm.IGNORED)
    found = vlm.answer_loss(model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    parameters = {name: p for name, p in model.named_parameters() if "post_layernorm" not in name}
    grads = [
        dict(zip(parameters, torch.autograd.grad(each, parameters.values(), allow_unused=True), strict=True))
        for each in (expected, found)
    ]
    used = [name for name in parameters if grads[0][name] is not None]
    assert len(used) > 50
    assert difference(*({name: each[name] for name in used} for each in grads)) < 1e-8


@pytest.mark.parametrize("fewer", FEWER)
@pytest.mark.parametrize("questions", ["equal", "mixed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_a_true_batch_is_the_loop(fewer, questions, dtype, tolerance):
    config = tiny(model=fewer, data={"questions": questions})
    model, batch = build(config, dtype), read_batch(config, 6)
    lengths = batch["attention_mask"].sum(1)
    assert (len(set(lengths.tolist())) == 1) == (questions == "equal")
    one_by_one = vlm.train_step(model, batch)
    expected = gradients(model)
    together = vlm.train_step_batch(model, batch)
    assert together.microbatch_sizes == (6,)
    assert one_by_one.microbatch_sizes == (1,) * 6
    assert together.weight == one_by_one.weight == vlm.count_answer_tokens(batch)
    assert together.loss == pytest.approx(one_by_one.loss, rel=tolerance)
    assert difference(expected, gradients(model)) < tolerance


def test_the_mean_is_over_tokens_and_not_over_samples():
    config = tiny()
    model, batch = build(config), read_batch(config, 4)
    end = int(batch["attention_mask"][1].sum())
    batch["labels"][1, end - 6 : end] = batch["input_ids"][1, end - 6 : end]  # a longer answer than others
    parts = [
        (vlm.count_answer_tokens(one), vlm.answer_loss(model, one).item()) for one in vlm.split_samples(batch)
    ]
    counts = [count for count, _ in parts]
    assert len(set(counts)) > 1
    mean = sum(count * value for count, value in parts if count) / sum(counts)
    assert vlm.train_step(model, batch).loss == pytest.approx(mean)
    assert vlm.train_step_batch(model, batch).loss == pytest.approx(mean)
    assert sum(value for _, value in parts) / 4 != pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(("name", "size", "count"), [
    ("llava_1_5_7b", 224, 256), ("llava_1_5_7b", 336, 576), ("llava_1_5_7b", 448, 1024),
])  # fmt: skip
def test_vision_tokens_follow_from_size_and_patch(name, size, count):
    with torch.device("meta"):
        model = vlm.build_model(tiny(model={"type": name}))
        assert model.encode_images(torch.empty(2, 3, size, size, dtype=torch.uint8)).shape == (2, count, 4096)
    assert model.count_vision_tokens(size, size) == count
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.06e9, rel=1e-3)


def test_images_have_their_own_sizes_one_by_one():
    config = tiny(is_true_batch=False)
    model, batch = build(config), read_batch(config, 8)
    sizes = [tuple(size) for size in batch["sizes"].tolist()]
    assert len(set(sizes)) > 3
    assert all(max(size) == 56 and min(size) % 14 == 0 for size in sizes)
    counts = (batch["input_ids"] == vlm.IMAGE).sum(1).tolist()
    assert counts == [(height // 14) * (width // 14) for height, width in sizes]
    expected = vlm.train_step(model, batch)
    wanted = gradients(model)
    at_once = te.accumulate_gradients(model, vlm.answer_loss, [batch], weight=vlm.count_answer_tokens)
    assert at_once.loss == pytest.approx(expected.loss)
    assert difference(wanted, gradients(model)) < 1e-8


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 640, (252, 336)), (500, 332, (336, 210)), (100, 100, (336, 336)), (10, 2000, (14, 336))],
)
def test_scaled_sizes_keep_their_proportion(height, width, expected):
    assert vlm_questions.scaled_size(height, width, 336) == expected


@pytest.mark.parametrize(
    ("sides", "expected"),
    [([100, 100], 168), ([300, 340, 350], 336), ([900, 1000], 448), ([200, 205, 999], 210)],
)
def test_the_size_that_fits_the_data(sides, expected):
    assert vlm_questions.choose_unified_size(sides, 336) == expected


def test_auto_is_a_size_of_the_training_images_for_both_sets():
    config = tiny(model={"unified_image_size": "auto"})
    sizes = {vlm.open_questions(config, name).size for name in ("training", "validation")}
    assert sizes == {70}
    assert vlm.build_task(config).worst_case(2)["pixels"].shape == (2, 3, 70, 70)


# Merging and pruning


def test_merging_takes_the_most_alike():
    tokens = torch.eye(8)[None].repeat(2, 1, 1).double()
    tokens[0, 2] = tokens[0, 5] + 0.01 * tokens[0, 2]  # an even one that is like an odd one
    merged = vlm_model.merge_tokens(tokens, 7)
    assert merged.shape == (2, 7, 8)
    expected = torch.stack([tokens[0, n] for n in (0, 1, 3, 4, 5, 6, 7)])
    expected[4] = (tokens[0, 5] + tokens[0, 2]) / 2
    assert torch.allclose(merged[0], expected)
    assert torch.equal(vlm_model.merge_tokens(tokens, 8), tokens)
    assert torch.equal(vlm_model.merge_tokens(tokens[:, :1], 1), tokens[:, :1])
    half = vlm_model.merge_tokens(torch.randn(3, 9, 4), 5)
    assert half.shape == (3, 5, 4)


def test_pruned_layers_see_fewer_tokens_with_the_positions_they_had():
    config = tiny(model={"prune_layers": [1, 2], "unified_image_size": 56})
    model, batch = build(config), read_batch(config, 3)
    seen = []
    layers = model.llava.model.language_model.layers
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                (kwargs["hidden_states"].shape[1], kwargs["position_embeddings"][0].shape[1])
            ),
            with_kwargs=True,
        )
    (answers,) = model(batch)
    length = batch["input_ids"].shape[1]
    assert seen == [(length - gone,) * 2 for gone in (0, 8, 12)]
    assert answers.num_vision_tokens == model.count_vision_tokens(56, 56) == 4
    (whole,) = model(batch, is_reduced=False)
    assert whole.num_vision_tokens == 16
    assert seen[3:] == [(length, length)] * 3
    assert not torch.allclose(whole.logits, answers.logits)


def test_pruned_layers_can_be_computed_again():
    """With memory.checkpointing the hooks are gone when the backward pass comes to a layer's second pass."""
    config = tiny(model={"prune_layers": [0, 2], "merge_keep": 0.7})
    model, batch = build(config), read_batch(config, 4)
    expected_loss, expected = vlm.train_step_batch(model, batch).loss, gradients(model)
    apply_checkpointing(model, "blocks")
    assert vlm.train_step_batch(model, batch).loss == pytest.approx(expected_loss)
    assert difference(expected, gradients(model)) < 1e-8


def test_what_is_kept_is_what_is_most_like_the_question():
    pruning = vlm_model.LayerPruning(1, 4, torch.tensor([[True, False, False]]), 0.5)
    hidden = torch.tensor([[[9.0, 9], [0, 1], [1, 0.1], [-1, 0], [1, 0.2], [1, 0], [-5, 9], [3, -9]]])
    assert pruning._choose(hidden).tolist() == [[0, 2, 4, 5, 6, 7]]
    assert pruning.num_vision_tokens == 2


def num_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("fails_at", [None, 0, 2])
def test_no_hook_is_left_whatever_happens(fails_at):
    config = tiny(model={"prune_layers": [0, 2]})
    model, batch = build(config), read_batch(config, 2)
    layers = model.llava.model.language_model.layers
    before = num_hooks(model)
    during = []

    def look(module, args, kwargs):
        during.append(num_hooks(model) - before)
        if fails_at is not None:
            raise KeyboardInterrupt

    handle = layers[fails_at or 0].mlp.register_forward_pre_hook(look, with_kwargs=True)
    before += 1
    if fails_at is None:
        model(batch)
    else:
        with pytest.raises(KeyboardInterrupt):
            model(batch)
    assert during == [len(layers)]
    assert num_hooks(model) == before
    handle.remove()
    assert vlm.answer_loss(model, batch).item() > 0


# The adversarial loss


def adversarial(**model):
    return tiny(model={"prune_layers": [1], **model}, loss={"adversarial_weight": 0.5})


def test_neither_loss_reaches_the_others_parameters():
    config = adversarial()
    model, batch = build(config), read_batch(config, 4)
    generator_loss, discriminator_loss = model(batch)
    generator_loss.backward(retain_graph=True)
    assert all(p.grad is None for p in model.discriminator.parameters())
    passed = gradients(model)
    plain = vlm.answer_loss(model.generator, batch)
    plain.backward()
    of_answers = {f"generator.{name}": value for name, value in gradients(model.generator).items()}
    assert difference(passed, of_answers) > 1e-4  # what is learned from the discriminator
    discriminator_loss.backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.discriminator.parameters())


@pytest.mark.parametrize("is_true_batch", [True, False])
@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 2, 3)])
def test_both_gradients_accumulate_exactly(is_true_batch, sizes):
    config = adversarial()
    model, batch = build(config), read_batch(config, 6)
    vlm.train_step(model, batch, adversarial_loss)
    expected = gradients(model)
    assert any(name.startswith("discriminator") for name in expected)
    model.generator.is_true_batch = is_true_batch
    parts = te.split_batch(batch, sizes)
    te.accumulate_gradients(model, adversarial_loss, parts, weight=vlm.count_answer_tokens)
    assert difference(expected, gradients(model)) < 1e-8


class OutOfMemoryAbove:
    """A loss that runs out of memory with more samples than this."""

    def __init__(self, most):
        self.most, self.sizes = most, []

    def __call__(self, model, batch):
        self.sizes.append(len(batch["input_ids"]))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return adversarial_loss(model, batch)


def train_by_hand(config, folder, *, limit=8, epochs=2, checkpoint=None, **settings):
    """Return the reports, the batch plans told on the way, and the last checkpoint."""
    folder.mkdir()
    sent = []
    trial = TrialContext(
        task=vlm.build_task(config),
        device_name="cpu",
        batch_plan=BatchPlan.build(8, limit),
        settings=make_settings(epochs=epochs, clip_norm=1.0, **settings),
        memory=CpuMemory(),
        scratch_dir=folder,
        checkpoint_path=checkpoint,
        send=sent.append,
    )
    vlm.train_adversarial(config, trial)
    reports = [message.metrics for message in sent if isinstance(message, Report)]
    plans = [message for message in sent if isinstance(message, PlanChanged)]
    return reports, plans, torch.load(folder / "checkpoint.pt")


def assert_same_training(one, other):
    assert [r["train_loss"] for r in one[0]] == pytest.approx([r["train_loss"] for r in other[0]], rel=1e-4)
    for name, weight in one[2]["model"].items():
        assert torch.allclose(weight, other[2]["model"][name], atol=1e-3), name


def test_two_optimizers_train_alike_at_any_micro_batch_and_after_a_rescue(tmp_path, monkeypatch):
    config = adversarial()
    whole = train_by_hand(config, tmp_path / "whole")
    first, last = whole[0]
    assert last["train_loss"] < first["train_loss"]
    assert (last["vision_tokens_mean"], last["vision_tokens_max"], last["vision_tokens_min"]) == (8, 8, 8)
    assert len(whole[2]["optimizers"]) == 2
    assert_same_training(train_by_hand(config, tmp_path / "parts", limit=3), whole)
    loss = OutOfMemoryAbove(4)
    monkeypatch.setattr(vlm_adversarial, "adversarial_loss", loss)
    rescued = train_by_hand(config, tmp_path / "rescued")
    assert loss.sizes == [8] + [4] * 8  # of 16 samples in each of two epochs
    assert len(rescued[1]) == 1
    assert_same_training(rescued, whole)


def test_adversarial_training_goes_on_from_its_checkpoint(tmp_path):
    config = adversarial()
    whole = train_by_hand(config, tmp_path / "whole")
    train_by_hand(config, tmp_path / "first", epochs=1)
    resumed = train_by_hand(config, tmp_path / "second", checkpoint=tmp_path / "first/checkpoint.pt")
    assert [report["epoch"] for report in resumed[0]] == [2]
    assert resumed[0][0]["train_loss"] == pytest.approx(whole[0][1]["train_loss"], rel=1e-4)


def test_in_half_precision_both_optimizers_skip_the_same_steps(tmp_path, monkeypatch):
    from tune_easytrain.loss_scale import LossScale

    backward = LossScale.backward
    calls = []

    def overflow_once(self, loss):
        calls.append(loss)
        backward(self, loss * float("inf") if len(calls) == 1 else loss)

    monkeypatch.setattr(LossScale, "backward", overflow_once)
    config = adversarial()
    _, _, checkpoint = train_by_hand(config, tmp_path / "run", epochs=6, precision="fp16")
    steps = [{int(s["step"]) for s in each["state"].values()} for each in checkpoint["optimizers"]]
    num_skipped = checkpoint["scale"]["num_skipped_steps"]
    assert len(calls) == 12
    assert 1 <= num_skipped < 12
    assert steps == [{12 - num_skipped}] * 2


def test_what_the_adversarial_function_needs_is_told(tmp_path):
    with pytest.raises(te.BadInputError, match=r"needs loss\.adversarial_weight above 0"):
        train_by_hand(tiny(), tmp_path / "run")
    with pytest.raises(te.BadInputError, match=r"set trial\.num_workers: 1"):
        train_by_hand(adversarial(), tmp_path / "more", num_workers=2)


# What is said to be wrong


def test_tokens_that_are_not_aligned_are_told():
    config = tiny(model={"unified_image_size": 28})
    model = build(config)
    data = vlm.open_questions(config, "training")
    samples = [data[index] for index in range(6)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    shorter = next(number for number, length in enumerate(lengths) if length != lengths[0])
    batch = vlm.collate(samples, side="left")
    starts = [3 + max(lengths) - length for length in lengths]
    expected = (
        rf"sample 0 has them at {starts[0]}…{starts[0] + 3}, "
        rf"sample {shorter} at {starts[shorter]}…{starts[shorter] + 3}; pad on the right"
    )
    with pytest.raises(ValueError, match=f"vision token positions not aligned across the batch: {expected}"):
        vlm.train_step_batch(model, batch)
    equal = vlm.collate([samples[0]] * 2, side="left")
    assert vlm.train_step_batch(model, equal).loss > 0


def test_images_of_other_sizes_are_told():
    model = build(tiny())
    batch = read_batch(tiny(is_true_batch=False), 4)
    with pytest.raises(vlm_model.VisionTokensError, match=r"sample 0 has \d+ × \d+ pixels, sample \d has"):
        model.preprocess_batch(batch)
    batch = read_batch(tiny(model={"unified_image_size": 28}), 2)
    batch["pixels"] = F.pad(batch["pixels"], (0, 14, 0, 14))
    with pytest.raises(
        vlm_model.VisionTokensError, match=r"has 4 vision tokens in its text, at 3…6, and its"
    ):
        model.preprocess_batch(batch)
    batch["input_ids"][1] = vlm_questions.BOS
    with pytest.raises(vlm_model.VisionTokensError, match="has 4 vision tokens"):
        model.preprocess_batch(batch)


def test_batches_without_true_batches_are_told():
    config = tiny(is_true_batch=False)
    model, batch = build(config), read_batch(config, 2)
    with pytest.raises(te.BadInputError, match=r"preprocess_batch needs .* model\.enable_true_batch: true"):
        model.preprocess_batch(batch)
    with pytest.raises(te.BadInputError, match=r"train_step_batch needs model\.enable_true_batch: true"):
        vlm.train_step_batch(model, batch)


STARVED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
import vlm_true_batch as vlm
from vlm_questions import longest_batch
torch.set_num_threads(1)
config = {"model": {"enable_true_batch": True, "unified_image_size": 280}}
model = vlm.build_model(config)
vlm.train_step_batch(model, longest_batch(1, 280))
batch = longest_batch(64, 280)
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**27, resource.RLIM_INFINITY))
try:
    vlm.train_step_batch(model, batch)
except torch.OutOfMemoryError as error:
    print(error)
"""


def test_memory_that_runs_out_is_told_with_what_to_change():
    """Really: all that 64 samples of 280 × 280 pixels may take is 128 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", STARVED, str(ROOT / "examples")], capture_output=True, text=True, check=True
    )
    assert "memory ran out with 64 samples of 280 × 280 pixels in one pass (" in done.stdout
    for remedy in ("hp.batch_size", "accumulate their gradients (batch.effective", "unified_image_size"):
        assert remedy in done.stdout


def test_an_error_of_another_kind_is_not_taken_for_memory():
    model = build(tiny())
    with pytest.raises(KeyError):
        vlm.train_step_batch(model, {"pixels": torch.zeros(2, 3, 28, 28), "input_ids": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"type": "llava"}}, r"model\.type: unknown name 'llava'"),
        ({"model": {"unified_size": 28}}, r"did you mean 'unified_image_size'"),
        ({"data": {"questions": "same"}}, r"data\.questions: unknown name 'same'; valid: mixed, equal"),
        ({"backbone_settings": {"mllm_settings": {"true_batch": True}}}, "did you mean 'enable_true_batch'"),
    ],
)
def test_unknown_names(sections, message):
    with pytest.raises(te.UnknownNameError, match=message):
        vlm.build_task(tiny(**sections))


def test_all_wrong_values_are_told_at_once():
    wrong = {
        "model": {
            "enable_true_batch": "yes", "unified_image_size": 7, "lora_rank": -1, "merge_keep": 0.4,
            "freeze_backbone": 1, "prune_layers": [3], "backbone_dtype": "fp16",
        },
        "loss": {"adversarial_weight": "much"},
        "hp": {"learning_rate": -1},
    }  # fmt: skip
    with pytest.raises(te.ConfigError) as caught:
        vlm.build_task(tiny(**wrong))
    assert [fault.path for fault in caught.value.faults] == [
        "enable_true_batch", "unified_image_size", "model.lora_rank", "model.merge_keep",
        "loss.adversarial_weight", "hp.learning_rate", "model.freeze_backbone", "model.prune_layers",
    ]  # fmt: skip
    half = {"freeze_backbone": True, "backbone_dtype": "fp16"}
    with pytest.raises(te.ConfigError, match=r"is fp16, and train\.precision is fp32; set train"):
        vlm.build_task(tiny(model=half, train={"precision": "fp32"}))
    with pytest.raises(te.ConfigError, match="is fp16 of what is trained"):
        vlm.build_task(tiny(model={"backbone_dtype": "fp16"}))


# As a task


def test_the_sources_keys_are_read_too():
    config = tiny()
    del config["model"]
    task = vlm.build_task({**config, "backbone_settings": SOURCE_KEYS})
    assert task.model().is_true_batch
    assert task.train_data()[0]["pixels"].shape == (3, 28, 28)
    with pytest.raises(te.ConfigError, match=r"unified_image_size: is 28, and model"):
        vlm.build_task({"model": {"unified_image_size": 56}, "backbone_settings": SOURCE_KEYS})


@pytest.mark.parametrize(
    ("is_true_batch", "expected"), [(True, vlm.train_step_batch), (False, vlm.train_step)]
)
def test_the_config_chooses_the_step(is_true_batch, expected):
    assert vlm.choose_train_step(tiny(is_true_batch)) is expected
    elsewhere = {"mllm_settings": {"enable_true_batch": is_true_batch}}
    assert vlm.choose_train_step({"backbone_settings": elsewhere}) is expected


def test_no_photo_is_in_two_sets_and_samples_are_always_the_same():
    config = tiny()
    sets = [vlm.open_questions(config, name) for name in ("training", "validation")]
    assert [len(data) for data in sets] == [16, 4]
    photos = [{sample.photo for sample in data._samples} for data in sets]
    assert not photos[0] & photos[1]
    again = pickle.loads(pickle.dumps(sets[0]))
    assert all(torch.equal(again[3][name], value) for name, value in sets[0][3].items())


def test_answers_are_what_the_picture_shows():
    data = vlm.open_questions(tiny(data={"num_samples": 60}), "training")
    words = vlm_questions.WORDS
    kinds = set()
    for index in range(60):
        sample, drawn = data[index], data._samples[index]
        pixels = sample["pixels"].float()
        sides = {
            "left": pixels[:, :, :28], "right": pixels[:, :, 28:],
            "top": pixels[:, :28], "bottom": pixels[:, 28:],
        }  # fmt: skip
        opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
        dark = sample["labels"][sample["labels"] != vlm.IGNORED].tolist()
        assert len(sample["input_ids"]) == data.lengths[index]
        assert dark[1] == vlm_questions.EOS
        answer = words[dark[0] - vlm_questions.EOS - 2]
        if answer in sides:
            assert answer == drawn.side
        else:
            asked = next(word for word in drawn.question if word in sides)
            assert (answer == "yes") == (asked == drawn.side)
        kinds.add(answer)
        means = {side: float(part.mean()) for side, part in sides.items()}
        assert means[drawn.side] < 0.8 * means[opposite[drawn.side]] or means[opposite[drawn.side]] < 40
    assert kinds == {"left", "right", "top", "bottom", "yes", "no"}


def test_batches_are_padded_to_their_longest_on_the_right():
    config = tiny()
    task = vlm.build_task(config)
    data = task.train_data()
    loader = EpochLoader(task, data, torch.device("cpu"), seed=0, num_workers=0)
    widths = {batch["input_ids"].shape[1] for batch in loader.windows(16, 0).read(0, BatchPlan.build(16, 2))}
    assert len(widths) > 1  # not all are as long as the longest of all
    assert max(widths) == max(data.lengths)
    batch = read_batch(config, 8)
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert torch.equal(mask, (row != vlm_questions.PAD).long())
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)


def test_the_worst_case_is_no_smaller_than_any_batch():
    config = tiny()
    batch, worst = read_batch(config, 16), vlm.build_task(config).worst_case(16)
    assert {name: value.shape for name, value in worst.items()} == {n: v.shape for n, v in batch.items()}
    longer = vlm.build_task(tiny(data={"longest_text": 64})).worst_case(2)
    assert longer["input_ids"].shape == (2, 64 + 16)


@pytest.mark.parametrize("fewer", [{}, {"merge_keep": 0.5}, {"prune_layers": [1]}])
def test_a_true_batch_is_estimated_by_two_traces(fewer):
    estimate = te.estimate_memory(vlm.build_task, tiny(model=fewer), device="cpu")
    assert len(estimate.segments) == 1
    assert estimate.missing == {}
    if fewer:
        whole = te.estimate_memory(vlm.build_task, tiny(), device="cpu")
        assert estimate.peak_bytes(64) < whole.peak_bytes(64)
        assert estimate.flops_per_sample < whole.flops_per_sample


def test_one_by_one_there_is_no_estimate_and_it_says_why():
    with pytest.raises(te.EstimateError, match="samples pass through one by one"):
        te.estimate_memory(vlm.build_task, tiny(is_true_batch=False))


def test_a_frozen_backbone_keeps_its_own_format_and_the_rest_is_trained():
    config = tiny(model={"freeze_backbone": True, "backbone_dtype": "bf16"})
    model = vlm.build_model(config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"multi_modal_projector"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert vlm.train_step_batch(model, read_batch(config, 4)).loss > 0
    assert gradients(model).keys() == trained


def test_adapters_are_trained_beside_the_projector():
    pytest.importorskip("peft")
    config = tiny(model={"freeze_backbone": True, "lora_rank": 2})
    model, batch = build(config), read_batch(config, 4)
    vlm.train_step(model, batch)
    expected = gradients(model)
    assert sum("lora_" in name for name in expected) == 3 * 2 * 2
    vlm.train_step_batch(model, batch)
    assert difference(expected, gradients(model)) < 1e-8


def test_without_peft_adapters_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(te.ConfigError, match=r"model\.lora_rank: adapts a backbone that is trained itself"):
        vlm.build_task(tiny(model={"lora_rank": 2}))
    with pytest.raises(te.BadInputError, match=r"model\.lora_rank needs peft"):
        vlm.build_model(tiny(model={"lora_rank": 2}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(te.BadInputError, match=r"needs transformers.* pip install 'tune-easytrain\[lm\]'"):
        vlm.build_model(tiny())


def test_packages_that_are_not_installed_are_told(monkeypatch):
    monkeypatch.setattr(vlm_questions, "find_spec", lambda name: None)
    with pytest.raises(te.DataError, match=r"pip install 'tune-easytrain\[lm,iqa\]'"):
        vlm.build_task(tiny()).train_data()


def test_the_functions_travel_with_the_files_beside_them(tmp_path):
    """A worker has neither the examples nor their folder."""
    place = {"project_root": ROOT, "sweep_dir": ROOT / "configs"}
    for name in ("build_task", "train_adversarial"):
        function = load_function(f"examples/vlm_true_batch.py:{name}", key="task", **place)
        (tmp_path / name).write_bytes(pickle_function(function, "task"))
    code = (
        "import pickle, sys; build, train = (pickle.load(open(p, 'rb')) for p in sys.argv[1:]); "
        "print(build({'model': {'enable_true_batch': True}}).train_data().size, train.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "build_task"), str(tmp_path / "train_adversarial")],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["56", "train_adversarial"]


def test_the_demo_learns_and_reports_its_tokens(tmp_path):
    results = te.run(
        ROOT / "configs/vlm_true_batch_demo.yaml",
        overrides=[
            f"run.storage={tmp_path}",
            "grid_search={grid: {model.enable_true_batch: [true, false], hp.batch_size: [16]}}",
            "config.data.num_samples=32",
            "config.model.unified_image_size=28",
            "train.epochs=3",
            "batch.effective_batch_size=16",
        ],
        debug=True,
        quiet=True,
    )
    together, one_by_one = results.frame().to_dict("records")
    for row in (together, one_by_one):
        assert row["state"] == "finished", row["error"]
        assert row["train_loss_last"] < 3.5  # it begins at ln 64, the vocabulary's
        assert 0 <= row["val_accuracy_last"] <= 1
    names = [f"val_vision_tokens_{name}_last" for name in ("mean", "max", "min")]
    assert [together[name] for name in names] == [4, 4, 4]
    assert one_by_one[names[1]] > one_by_one[names[0]] > one_by_one[names[2]]


def test_the_adversarial_function_in_a_sweep(tmp_path):
    results = te.run(
        ROOT / "configs/vlm_true_batch_demo.yaml",
        overrides=[
            f"run.storage={tmp_path}",
            "grid_search={grid: {model.unified_image_size: [28], hp.batch_size: [5]}}",
            "config.data.num_samples=16",
            "config.loss.adversarial_weight=0.1",
            "config.model.merge_keep=0.5",
            "train.function=examples/vlm_true_batch.py:train_adversarial",
            "run.metric=train_loss",
            "batch.effective_batch_size=8",
        ],
        debug=True,
        quiet=True,
    )
    (row,) = results.frame().to_dict("records")
    assert row["state"] == "finished", row["error"]
    assert (row["microbatch_size"], row["accumulation_steps"]) == (4, 2)
    assert row["vision_tokens_mean_last"] == row["vision_tokens_min_last"] == 2


# The check


def call_check(*options):
    return vlm.main(["check", "--config", str(ROOT / "configs/vlm_true_batch_demo.yaml"), *options])


def test_the_check_says_that_curves_are_equal(capsys):
    assert call_check("--steps", "3", "--batch-sizes", "2", "3", "--set", "config.data.num_samples=8") == 0
    out = capsys.readouterr().out
    assert out.count("the loss curves are equal") == 2
    assert "vision tokens: mean 4, max 4, min 4" in out
    losses = [float(line.split()[1]) for line in out.splitlines() if line.startswith("   ")]
    assert losses[2] < losses[0]


def test_the_check_finds_a_batch_that_is_none(capsys, monkeypatch):
    step = vlm.train_step_batch

    def without_the_last_sample(model, batch, loss):
        return step(model, {name: value[:-1] for name, value in batch.items()}, loss)

    monkeypatch.setattr(vlm, "train_step_batch", without_the_last_sample)
    assert call_check("--steps", "2", "--set", "config.data.num_samples=8") == 1
    assert "the loss curves are NOT equal: they differ by at most" in capsys.readouterr().out


def test_the_check_says_what_it_cannot_use(capsys):
    assert call_check("--set", "config.model.merge_keep=3") == 2
    assert "error: config: model.merge_keep: 3 cannot be used" in capsys.readouterr().err


def test_the_check_works_where_the_source_has_its_keys(capsys, tmp_path):
    file = tmp_path / "sweep.yaml"
    keys = json.dumps({"mllm_settings": {"enable_true_batch": False, "unified_image_size": 28}})
    config = f"{{data: {{num_samples: 8}}, backbone_settings: {keys}}}"
    file.write_text(f"config: {config}\nbatch: {{effective_batch_size: 2}}\n")
    assert vlm.main(["check", "--config", str(file), "--steps", "1"]) == 0
    assert "28 × 28 pixels" in capsys.readouterr().out


# The sweeps and the benchmark


def test_the_gpu_sweep_is_the_one_asked_for():
    trials = te.expand_trials(te.load_config(ROOT / "configs/vlm_true_batch.yaml"))
    found = [(vlm.batch_settings(trial), trial["hp"]["batch_size"]) for trial in trials]
    assert found == [((True, size), limit) for size in (224, 336, 448) for limit in (10, 32)]
    assert all(trial["batch"]["memory_budget"] == 32 * 2**30 for trial in trials)
    with torch.device("meta"):
        model = vlm.build_task(trials[0]).model()
    backbone = sum(p.numel() for p in model.parameters() if p.dtype == torch.float16)
    assert backbone == pytest.approx(7.04e9, rel=1e-2)


def test_the_benchmark_runs_tiny_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import true_batch

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["true_batch.py", "--device", "cpu", *options])
        true_batch.main()
        return capsys.readouterr().out

    kept = tmp_path / "rows.jsonl"
    printed = call("--tiny", "--part", "speed", "--num-samples", "2", "--json", str(kept))
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["way"] for row in rows] == ["together", "one by one", "one backward"]
    assert all(row["samples_per_second"] > 0 and row["tflops"] > 0 for row in rows)
    assert printed.count("| tiny | bf16 | 2 |") == 3
    assert call("--markdown", str(kept)) == printed


@pytest.mark.parametrize("option", ["--steps", "--batch-sizes"])
def test_the_check_takes_nothing_below_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        vlm.main(["check", "--config", "configs/vlm_true_batch_demo.yaml", option, "0"])
    assert ended.value.code == 2
    assert "'0' is no number of at least 1" in capsys.readouterr().err
