"""The language-model example: its text, its loss under accumulation, LoRA, and what it says is wrong."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from example_files import load_example
from hypothesis import given
from hypothesis import strategies as st
from test_train_loop import drive

import tune_easytrain as te
from tune_easytrain.checkpointing import apply_checkpointing, find_blocks
from tune_easytrain.length_batches import measure_lengths

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]


lm = load_example("lm_finetune")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small(cache):
    """A config of the smallest model; sections given are put over it."""

    def make(**sections):
        config = {
            "model": {"type": "tiny", "width": 32, "ffn_width": 64},
            "data": {"cache": cache, "max_length": 32, "vocabulary": 400, "share": 0.1},
            "hp": {"learning_rate": 1e-2},
            "batch": {"effective_batch_size": 16},
            "train": {"epochs": 1},
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        return config

    return make


def write_texts(folder, texts):
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def batch_of(task, count, first=0):
    data = task.train_data()
    return task.collate([data[index] for index in range(first, first + count)])


# The text


@pytest.mark.parametrize("split", [0, 1, 7])
def test_nothing_is_evaluated_that_was_trained_on(small, split):
    """Sections of Python's reference stand in several of its documents; one is there twice."""
    sets = lm.split_documents(small(data={"split": split, "share": 1.0}))
    texts = set(lm.read_documents({}).values())
    assert len(texts) < len(lm.read_documents({}))
    assert set(sets["training"]) < texts
    assert len(sets["validation"]) == len(texts) - len(sets["training"]) == round(0.1 * len(texts))
    training, validation = (
        {part for document in documents for part in lm.cut_document(document, "paragraphs")}
        for documents in sets.values()
    )
    assert len(validation) > 50
    assert not training & validation


@given(st.lists(st.integers(0, 9), min_size=2, max_size=50), st.integers(2, 12))
def test_every_token_but_the_first_is_predicted_once(tokens, max_length):
    parts = [torch.tensor(part) for part in lm.cut_sample(tokens, max_length)]
    labels = lm.collate(parts)["labels"]
    assert [label for row in labels.tolist() for label in row if label != lm.IGNORED] == tokens[1:]
    assert all(2 <= len(part) <= max_length for part in parts)


def test_samples_are_paragraphs_between_separators(small, tmp_path):
    texts = {"a.txt": "one\n\ntwo lines\nof it\n\n  \n", "deep/b.txt": "three\n\n\nfour"}
    root = write_texts(tmp_path, texts)
    data = {"root": str(root), "tokenizer": "bytes", "share": 1.0, "validation_share": 0.5}
    found = {}
    for kind in ("paragraphs", "documents"):
        task = lm.build_task(small(data={**data, "samples": kind}))
        sets = task.train_data(), task.val_data()
        assert all(sample[0] == sample[-1] == 256 for part in sets for sample in part)
        found[kind] = sorted(bytes(sample[1:-1].tolist()).decode() for part in sets for sample in part)
    assert found["paragraphs"] == ["four", "one", "three", "two lines\nof it"]
    assert [re.sub(r"\s+", " ", text).strip() for text in found["documents"]] == [
        "one two lines of it",
        "three four",
    ]


def test_tokens_are_the_text_and_lengths_are_known_without_it(small):
    task = lm.build_task(small(data={"max_length": 10**6, "samples": "documents"}))
    data = pickle.loads(pickle.dumps(task.train_data()))
    lengths = measure_lengths(task, data)
    assert list(lengths.tokens) == [len(data[index]) for index in range(len(data))]
    tokenizer = lm.import_package("tokenizers").Tokenizer.from_str(lm.train_tokenizer(small()))
    texts = {tokenizer.decode(data[index].tolist()) for index in range(len(data))}
    expected = {text.strip("\n") for text in lm.split_documents(small())["training"]}
    assert texts == expected
    assert tokenizer.get_vocab_size() == lm.vocabulary_size(small()) == 400


def test_what_was_encoded_is_kept_until_the_text_changes(small, tmp_path):
    root = write_texts(tmp_path / "texts", {f"{name}.txt": f"{name} " * 40 for name in "abcd"})
    cache = tmp_path / "cache"
    config = small(data={"root": str(root), "cache": str(cache), "share": 1.0})
    first = lm.build_task(config).train_data()
    written = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = lm.build_task(config).train_data()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert {file.name: file.stat().st_mtime_ns for file in cache.iterdir()} == written
    assert sorted(name.partition("_")[0] for name in written) == ["bpe", "training"]
    (root / "a.txt").write_text("other text")
    (root / "b.txt").write_text("other words")
    lm.build_task(config).train_data()
    assert len(list(cache.iterdir())) == 4


def test_text_that_is_not_there_is_told(small, tmp_path):
    def told(root, **data):
        with pytest.raises(te.DataError) as caught:
            lm.build_task(small(data={"root": str(root), "share": 1.0, **data})).train_data()
        return str(caught.value)

    assert f"{tmp_path / 'none'} is no folder; give a folder of UTF-8 text files" in told(tmp_path / "none")
    assert "holds no *.txt" in told(tmp_path)
    write_texts(tmp_path, {"a.txt": "some text"})
    assert "has one document, and validation needs another" in told(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"good\xff")
    assert told(tmp_path).startswith(f"{tmp_path / 'b.txt'}: is not UTF-8 (invalid start byte at byte 4)")
    write_texts(tmp_path, {"a.txt": " \n\n", "b.txt": "\n"})
    assert "the training documents hold no text of their own" in told(tmp_path)
    write_texts(tmp_path, {"a.txt": "same", "b.txt": "same"})
    assert "has one document" in told(tmp_path)
    write_texts(tmp_path, {"b.txt": "text", "a.txt": "other text"})
    assert "a.txt/folder cannot be written" in told(tmp_path, cache=str(tmp_path / "a.txt" / "folder"))


@pytest.mark.parametrize("name", ["transformers", "peft", "tokenizers"])
def test_packages_that_are_not_installed_are_told(small, monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    task = lm.build_task(small(model={"lora_rank": 2}, data={"cache": str(tmp_path)}))
    with pytest.raises(te.DataError, match=rf"need {name}; pip install 'tune-easytrain\[lm\]'"):
        (task.train_data if name == "tokenizers" else task.model)()


# The loss


def test_batches_are_padded_to_their_longest():
    batch = lm.collate([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[6, 7, -100], [9, -100, -100]]
    assert lm.count_predicted(batch) == 3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_loss_is_that_of_transformers_with_its_mask(small, lora_rank):
    """Which is why none is needed: what pads on the right is seen by no token that counts."""
    task = lm.build_task(small(model={"lora_rank": lora_rank}))
    batch, model = batch_of(task, 12), task.model()
    assert 0 < batch["mask"].sum() < batch["mask"].numel()
    published = model(
        input_ids=batch["tokens"],
        attention_mask=batch["mask"],
        labels=batch["tokens"].masked_fill(batch["mask"] == 0, lm.IGNORED),
    )
    assert task.loss(model, batch).item() == pytest.approx(published.loss.item(), rel=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("limit", [1, 3, 8])
def test_a_window_is_the_mean_over_its_tokens_however_it_is_parted(small, limit, lora_rank):
    task = lm.build_task(small(model={"lora_rank": lora_rank}))
    data = task.train_data()
    torch.manual_seed(0)
    model = task.model().double()
    cuts = measure_lengths(task, data).cut(range(23), limit)
    assert len({len(cut) for cut in cuts}) > 1 or limit == 1
    parts = (task.collate([data[index] for index in cut]) for cut in cuts)
    record = te.accumulate_gradients(model, task.loss, parts, weight=task.weight)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    whole = batch_of(task, 23)
    model.zero_grad()
    loss = task.loss(model, whole)
    loss.backward()
    assert record.weight == task.weight(whole)
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    for gradient, parameter in zip(found, (p for p in model.parameters() if p.grad is not None), strict=True):
        # Logits are made fp32, so that bf16 weights have an exact loss.
        assert (gradient - parameter.grad).norm() <= 2e-6 * parameter.grad.norm() + 1e-12


def test_perplexity_is_that_of_all_tokens_together(small):
    task = lm.build_task(small())
    model, metric = task.model(), task.metrics["perplexity"]()
    with torch.no_grad():
        for first, count in ((0, 3), (3, 9)):
            metric.update(*task.predict(model, batch_of(task, count, first)))
        expected = task.loss(model, batch_of(task, 12)).exp()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_continuations_are_those_of_transformers_for_each_sample_alone(small):
    """The prompts of a batch differ in length; padding them changes nothing."""
    task = lm.build_task(small(generation={"prompt_tokens": 12, "new_tokens": 6}))
    torch.manual_seed(1)
    model = task.model().eval()
    batch = task.collate(sorted(task.train_data(), key=len)[::25])
    lengths = batch["mask"].sum(1).tolist()
    assert min(lengths) < 12 < max(lengths)
    found = task.generate(model, batch)
    assert found.shape == (len(lengths), 6)
    for row, length in enumerate(lengths):
        prompt = batch["tokens"][row : row + 1, : min(12, length)]
        alone = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        assert found[row].tolist() == alone[0, prompt.shape[1] :].tolist()


# Adapters, checkpointing, resume


def test_lora_trains_adapters_alone(small):
    task = lm.build_task(small(model={"lora_rank": 4, "frozen_weights": "bf16"}))
    model = task.model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    assert len(trained) == 2 * 2 * 7  # two matrices beside each of seven linear layers, in two blocks
    before = {name: p.clone() for name, p in trained.items()}
    optimizer = task.optimizer(model)
    for _ in range(2):  # an adapter's second matrix begins at 0, so that the first one learns later
        te.accumulate_gradients(model, task.loss, [batch_of(task, 4)], weight=task.weight)
        optimizer.step()
    assert set(optimizer.state) == set(trained.values())
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad is None for name in frozen)
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert not any(torch.equal(parameters[name], value) for name, value in before.items())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_checkpointed_blocks_are_the_models_and_change_no_gradient(small, lora_rank):
    task = lm.build_task(small(model={"lora_rank": lora_rank}))
    batch, gradients = batch_of(task, 6), []
    for wish in ("none", "blocks"):
        torch.manual_seed(0)
        model = task.model()
        assert [type(block).__name__ for block in find_blocks(model)] == 2 * ["LlamaDecoderLayer"]
        if wish != "none":
            apply_checkpointing(model, wish)
        task.loss(model, batch).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_estimate_knows_generation_and_what_checkpointing_saves(small, lora_rank):
    config = small(model={"lora_rank": lora_rank, "type": "small"}, data={"max_length": 64})
    plain, blocks = (
        te.estimate_memory(lm.build_task, config, device="cpu", checkpointing=wish)
        for wish in ("none", "blocks")
    )
    assert not plain.missing
    assert blocks.peak_bytes(16) < 0.7 * plain.peak_bytes(16)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_resumed_training_ends_at_the_same_weights(small, tmp_path, lora_rank):
    config = small(model={"lora_rank": lora_rank}, data={"share": 0.05}, train={"epochs": 2})
    task = lm.build_task(config)
    options = {"effective_batch_size": 16, "epochs": 2, "clip_norm": 1.0, "limit": 5, "warmup_steps": 2}
    whole = drive(task, tmp_path / "whole", **options)
    resumed = drive(task, tmp_path / "resumed", checkpoint=whole.checkpoints[0], **options)
    assert len(resumed.reports) == 1
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in resumed.weights.items())
    assert resumed.last["val_perplexity"] == whole.last["val_perplexity"]
    assert whole.last["val_perplexity"] == pytest.approx(math.exp(whole.last["val_loss"]), rel=1e-5)
    assert whole.last["learning_rate"] == pytest.approx(0, abs=1e-9)


# Pretrained models


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, cache):
    """The folder of a model and its tokenizer, as `save_pretrained` writes it."""
    transformers = lm.import_package("transformers")
    config = {
        "model": {"type": "tiny"},
        "data": {"cache": cache, "max_length": 32, "vocabulary": 400, "share": 0.1},
    }
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(5)
    lm.build_task(config).model().save_pretrained(folder)
    built = lm.import_package("tokenizers").Tokenizer.from_str(lm.train_tokenizer(config))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=built, eos_token=lm.SEPARATOR)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_pretrained_model_is_trained_with_its_own_tokenizer(pretrained, small, lora_rank):
    config = {
        **small(),
        "model": {"path": str(pretrained), "lora_rank": lora_rank},
        "data": {key: value for key, value in small()["data"].items() if key != "vocabulary"},
    }
    task, own = lm.build_task(config), lm.build_task(small())
    model = task.model()
    base = model.get_base_model() if lora_rank else model
    published = lm.import_package("transformers").AutoModelForCausalLM.from_pretrained(pretrained)
    layer = "model.embed_tokens.weight"
    assert torch.equal(base.state_dict()[layer], published.state_dict()[layer])
    assert not base.config.use_cache
    samples = zip(task.train_data(), own.train_data(), strict=True)
    assert all(torch.equal(one, other) for one, other in samples)
    assert task.loss(model, batch_of(task, 3)).isfinite()
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in task.model().parameters())


def test_a_folder_that_holds_no_model_is_told(pretrained, small, tmp_path):
    def told(part):
        config = {"model": {"path": str(tmp_path)}, "data": {"share": 0.1}}
        with pytest.raises(te.DataError) as caught:
            getattr(lm.build_task(config), part)()
        return str(caught.value)

    assert f"model.path: {tmp_path} has no config.json; give a folder that" in told("model")
    (tmp_path / "config.json").write_text((pretrained / "config.json").read_text())
    assert f"model.path: {tmp_path} holds no model that can be loaded" in told("model")
    assert f"model.path: {tmp_path} holds no tokenizer; save it there" in told("train_data")
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    assert f"model.path: {tmp_path} holds no tokenizer that can be loaded" in told("train_data")


# The config


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"type": "tinny"}}, r"model\.type: unknown name 'tinny'; did you mean 'tiny'"),
        ({"model": {"type": None}}, r"model\.type"),
        ({"model": {"lora": 4}}, "model: unknown name 'lora'; did you mean 'lora_"),
        ({"model": {"frozen_weights": "fp16"}}, r"model\.frozen_weights: unknown name 'fp16'"),
        ({"data": {"tokenizer": "bpee"}}, "did you mean 'bpe'"),
        ({"data": {"samples": "lines"}}, r"data\.samples: unknown name 'lines'"),
        ({"optimizer": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"generation": {"tokens": 3}}, "generation: unknown name 'tokens'"),
    ],
)
def test_unknown_names(small, sections, message):
    with pytest.raises(te.UnknownNameError, match=message):
        lm.build_task(small(**sections))


def test_all_wrong_values_are_told_at_once(small):
    wrong = {
        "model": {"lora_rank": -1, "num_layers": 0, "lora_dropout": 1.0},
        "data": {"max_length": 1, "vocabulary": "many", "share": 0, "root": 5},
        "hp": {"learning_rate": -1},
    }
    with pytest.raises(te.ConfigError) as caught:
        lm.build_task(small(**wrong))
    assert {fault.path for fault in caught.value.faults} == {
        f"{section}.{name}" for section, values in wrong.items() for name in values
    }


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, "3 does not divide model.width, 32, into even parts"),
        ({"num_kv_heads": 3}, "3 does not divide model.num_heads, 2; give a divisor"),
        ({"path": "here"}, r"model\.type: 'tiny' cannot go with model\.path"),
    ],
)
def test_what_does_not_go_together(small, model, message):
    with pytest.raises(te.ConfigError, match=message):
        lm.build_task(small(model=model))


@pytest.mark.parametrize(
    ("config", "num_samples", "steps"),
    [
        ({"batch": {"effective_batch_size": 32}}, 100, 4),
        ({"batch": {"effective_batch_size": 32}, "train": {"epochs": 3}}, 100, 12),
        ({"hp": {"batch_size": 50}}, 100, 2),
        ({"batch": {"effective_batch_size": 32}, "train": {"num_samples": 133}}, 100, 6),
        ({"train": {"num_steps": 500}}, 100, 500),
    ],
)
def test_steps_of_a_training(config, num_samples, steps):
    assert lm.num_steps(config, num_samples) == steps


def test_the_models_of_the_sweeps_build_without_storage():
    for name in ("lm_finetune", "lm_finetune_demo"):
        trials = te.expand_trials(te.load_config(ROOT / f"configs/{name}.yaml"))
        assert {trial["batch"]["effective_batch_size"] for trial in trials} == {
            trials[0]["batch"]["effective_batch_size"]
        }
        assert [bool(trial["model"]["lora_rank"]) for trial in trials] == [False, True, False, True]
        for trial in trials:
            with torch.device("meta"):
                model = lm.build_task(trial).model()
            assert all(parameter.is_meta for parameter in model.parameters())


def test_1b_is_the_published_one():
    with torch.device("meta"):
        model = lm.build_task({"model": {"type": "1b"}, "data": {"vocabulary": 128_256}}).model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_235_814_400


# Training


def unigram_entropy(task):
    """The loss, in nats, of who knows how often each token comes and nothing else."""
    data = task.train_data()
    counts = Counter(token for index in range(len(data)) for token in data[index][1:].tolist())
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def test_a_sweep_of_it_learns_more_than_how_often_tokens_come(tmp_path, cache):
    """Of the demo: micro-batches of like length, all weights, three epochs."""
    overrides = [
        f"run.storage={tmp_path}",
        f"config.data.cache={cache}",
        "train.epochs=3",
        "config.data.max_length=64",
        "grid_search={grid: {model.type: [tiny], hp.batch_size: [8], hp.learning_rate: [0.005]}}",
    ]
    results = te.run(ROOT / "configs/lm_finetune_demo.yaml", overrides=overrides, debug=True, quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["effective_batch_size"], row["microbatch_size"]) == ("finished", 32, 8)
    sweep = te.load_config(ROOT / "configs/lm_finetune_demo.yaml", overrides=overrides)
    entropy = unigram_entropy(lm.build_task(te.expand_trials(sweep)[0]))
    assert row["train_loss_last"] < entropy - 0.5
    assert math.log(row["val_perplexity_best"]) < entropy


def test_the_benchmark_runs_on_a_cpu(tmp_path):
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks/language_model_memory.py")]
    small = [
        "--model",
        "tiny",
        "--vocabulary",
        "400",
        "--length",
        "16",
        "--precisions",
        "fp32",
        "--sizes",
        "2",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for options in (["--device", "cpu", "--json", str(file), *small], ["--markdown", str(file)]):
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "of 4" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["lora_rank"], row["checkpointing"], row["outcome"]) for row in rows] == [
        (rank, wish, "fits") for rank in (0, 16) for wish in ("none", "blocks")
    ]
    assert all(row["estimated_peak_bytes"] > 4 * row["num_parameters"] for row in rows)


def test_the_table_of_the_page_is_what_was_measured():
    benchmark = ROOT / "benchmarks/language_model_memory"
    table = subprocess.run(
        [sys.executable, f"{benchmark}.py", "--markdown", f"{benchmark}_h100.jsonl"],
        capture_output=True, text=True, check=True,
    ).stdout.partition("\n\n")[0]  # fmt: skip
    page = (ROOT / "docs/language-models.md").read_text()
    assert table in page
    rows = [json.loads(line) for line in Path(f"{benchmark}_h100.jsonl").read_text().splitlines()]
    assert (
        len({(r["lora_rank"], r["precision"], r["checkpointing"], r["microbatch_size"]) for r in rows}) == 16
    )
    above = [100 * (row["estimated_peak_bytes"] / row["peak_bytes"] - 1) for row in rows]
    assert max(map(abs, above)) < 10
    assert f"{min(above):.1f} to {max(above):.1f} % above the peak in all sixteen" in page
    assert {f"{row['num_parameters']:,} parameters" in page for row in rows if not row["lora_rank"]} == {True}
