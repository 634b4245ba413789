# ruff: noqa: E501 (one line a fault)
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tune_easytrain.config import SweepConfig, find_project_root, load_config
from tune_easytrain.errors import ConfigError, Fault
from tune_easytrain.grid import Distribution
from tune_easytrain.search_space import expand_trials, num_trials
from tune_easytrain.sweep_plan import build_plan

SIZE = "batch: {effective_batch_size: 8}\n"
LR = "grid_search:\n  grid:\n    hp.lr: {loguniform: [1e-5, 1e-1]}\n"
POPULATION = SIZE + "train: {epochs: 9}\n" + LR


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def load(folder: Path, text: str, overrides: Sequence[str] = ()) -> SweepConfig:
    return load_config(write(folder, text), overrides=overrides)


def faults(folder: Path, text: str, overrides: Sequence[str] = ()) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, overrides)
    for fault in caught.value.faults:
        assert not any(word in str(fault) for word in ("pydantic", "Input should", "value_error", "https"))
    return caught.value.faults


# Each fault alone: the file, and the line, path, words of the problem and words of the remedy.
ALONE = [
    # whole file
    ("", None, "", "the file is empty", "begin with name"),
    (SIZE + "train: {seed: !x 1}\n", 2, "train.seed", "the tag !x", "without it"),
    ("- a\n", 1, "", "is a list", "begin with name, task, config"),
    ("confg: {}\n" + SIZE, 1, "confg", "'confg'", "did you mean 'config'?"),
    ("zzz: {}\n" + SIZE, 1, "zzz", "'zzz'", "valid: name, task, config, grid_search, batch, train, memory, trial, run"),
    (SIZE + "batch: {start: 1}\n", 2, "batch", "given twice (first on line 1)", "keep one"),
    # name and task
    (SIZE + "name: a b\n", 2, "name", "'a b'", "100 letters"),
    (SIZE + "name: -a\n", 2, "name", "'-a'", "the first a letter or digit"),
    (SIZE + "name: " + "a" * 101 + "\n", 2, "name", "a" * 101, "100"),
    (SIZE + "name: 5\n", 2, "name", "5 is an integer, not a string", 'write "5"'),
    (SIZE + "task: train\n", 2, "task", "'train' names no function", "path/file.py:function"),
    (SIZE + "task: a b:f\n", 2, "task", "'a b:f'", "module:function"),
    (SIZE + "task: x/.py:f\n", 2, "task", "'x/.py:f'", "module:function"),
    (SIZE + "task: m:1f\n", 2, "task", "'m:1f'", "module:function"),
    # config
    (SIZE + "config: 5\n", 2, "config", "5 is an integer, not a mapping", "key: value"),
    (SIZE + "config:\n  a: 1\n  memory: {}\n", 4, "config.memory", "'memory' is taken", "rename"),
    (SIZE + "config:\n  train: 1\n", 3, "config.train", "'train' is taken", "rename"),
    (SIZE + "config:\n  a:\n  - b: [{eval: 1}]\n", 4, "config.a[0].b[0].eval", "'eval'", "rename"),
    (SIZE + "config:\n  grid_search: [1]\n", 3, "config.grid_search", "Ray would execute", "rename"),
    (SIZE + "config:\n  hp.lr: 1\n", 3, "config.hp.lr", "'hp.lr' has a dot", "write hp: {lr: ...}"),
    (SIZE + "config:\n  a: .nan\n", 3, "config.a", "nan", "null"),
    (SIZE + "config:\n  '': 1\n", 3, "config.", "empty", "name"),
    ("config:\n  hp:\n    batch_size: 128.0\n", 3, "config.hp.batch_size", "128.0", "write 128"),
    ("config:\n  hp:\n    batch_size: true\n", 3, "config.hp.batch_size", "true is a boolean", "at least 1"),
    # grid values
    (SIZE + "grid_search: {grid: [1]}\n", 2, "grid_search.grid", "is a list", "key: [value, value]"),
    (SIZE + "grid_search:\n  grd: {}\n", 3, "grid_search.grd", "'grd'", "did you mean 'grid'?"),
    (SIZE + "grid_search:\n  grid:\n    a: []\n", 4, "grid_search.grid.a", "[] is an empty list", "one value"),
    (SIZE + "grid_search:\n  grid:\n    a:\n", 4, "grid_search.grid.a", "empty (null)", "[null]"),
    (SIZE + "grid_search:\n  grid:\n    a: [{b: {eval: 2}}]\n", 4, "grid_search.grid.a[0].b.eval", "'eval'", "re"),
    (SIZE + "grid_search:\n  grid:\n    a.eval: [1]\n", 4, "grid_search.grid.a.eval", "'eval'", "rename"),
    (SIZE + "grid_search:\n  grid:\n    a..b: [1]\n", 4, "grid_search.grid.a..b", "'a..b'", "one dot"),
    (SIZE + "grid_search:\n  grid:\n    a: [1]\n    a: [2]\n", 5, "grid_search.grid.a", "twice", "keep one"),
    ("grid_search:\n  grid:\n    hp.batch_size: [8,\n      '16']\n", 4, "grid_search.grid.hp.batch_size[1]",
     "'16' is a string, not an integer", "remove the quotes"),
    ("grid_search:\n  grid:\n    hp.batch_size: [8, true]\n", 3, "grid_search.grid.hp.batch_size[1]",
     "true is a boolean", "an integer of at least 1"),
    ("grid_search:\n  grid:\n    hp.batch_size: 0\n", 3, "grid_search.grid.hp.batch_size", "0", "at least 1"),
    ("grid_search:\n  grid:\n    hp.batch_size: [128.0]\n", 3, "grid_search.grid.hp.batch_size[0]",
     "128.0 is a number, not an integer", "write 128"),
    ("grid_search:\n  grid:\n    hp: [{batch_size: x}]\n", 3, "grid_search.grid.hp[0].batch_size",
     "'x' is a string", "integer of at least 1"),
    # grid keys
    (SIZE + "grid_search:\n  grid:\n    train.epocs: [1]\n", 4, "grid_search.grid.train.epocs",
     "'train.epocs'", "'train.epochs'"),
    (SIZE + "grid_search:\n  grid:\n    train: [1]\n", 4, "grid_search.grid.train", "'train'", "train.epochs"),
    (SIZE + "grid_search:\n  grid:\n    train.precision: [fp32, fp8]\n", 4,
     "grid_search.grid.train.precision[1]", "'fp8'", "'fp32'"),
    (SIZE + "grid_search:\n  grid:\n    batch.start: 0\n", 4, "grid_search.grid.batch.start", "0", "at least 1"),
    (SIZE + "grid_search:\n  grid:\n    trial.resources.gpu: [1]\n", 4,
     "grid_search.grid.trial.resources.gpu", "every trial gets the same resources", "remove"),
    (SIZE + "grid_search:\n  grid:\n    run.metric: [a]\n", 4, "grid_search.grid.run.metric", "as a whole", "rem"),
    (SIZE + "grid_search:\n  grid:\n    config.hp.lr: [1]\n", 4, "grid_search.grid.config.hp.lr",
     "already relative to config", "write hp.lr"),
    (SIZE + "grid_search:\n  grid:\n    m: [1]\n    m.type: [2]\n", 4, "grid_search.grid.m", "'m.type'", "keep"),
    (SIZE + "config: {m: {t: 3}}\ngrid_search:\n  grid:\n    m.t.u: [2]\n", 5, "grid_search.grid.m.t.u",
     "config.m.t, which is 3", "remove config.m.t"),
    # distributions
    (SIZE + "grid_search:\n  grid:\n    a: {unifrm: [0, 1]}\n", 4, "grid_search.grid.a.unifrm", "'unifrm'",
     "did you mean 'uniform'"),
    (SIZE + "grid_search:\n  grid:\n    a: {x: 1, y: 2}\n", 4, "grid_search.grid.a", "is a mapping", "[{...}]"),
    (SIZE + "grid_search:\n  grid:\n    a: {uniform: 3}\n", 4, "grid_search.grid.a.uniform", "3 is an integer",
     "{uniform: [low, high]}"),
    (SIZE + "grid_search:\n  grid:\n    a: {uniform: [2, 1]}\n", 4, "grid_search.grid.a.uniform", "[2, 1]", "two"),
    (SIZE + "grid_search:\n  grid:\n    a: {uniform: [0, .inf]}\n", 4, "grid_search.grid.a.uniform", "[0,", "two"),
    (SIZE + "grid_search:\n  grid:\n    a: {loguniform: [0, 1]}\n", 4, "grid_search.grid.a.loguniform",
     "[0, 1]", "above 0"),
    (SIZE + "grid_search:\n  grid:\n    a: {randint: [0, 1.5]}\n", 4, "grid_search.grid.a.randint", "1.5",
     "two integers"),
    (SIZE + "grid_search:\n  grid:\n    a: {choice: []}\n", 4, "grid_search.grid.a.choice", "empty list", "one"),
    (SIZE + "grid_search:\n  grid:\n    a: {choice: [{eval: 1}]}\n", 4, "grid_search.grid.a.choice[0].eval",
     "'eval'", "rename"),
    (SIZE + "grid_search:\n  grid:\n    point: {choice: [1]}\n", 4, "grid_search.grid.point", "taken", "rename"),
    ("grid_search:\n  grid:\n    hp.batch_size: {uniform: [1, 8]}\n", 3,
     "grid_search.grid.hp.batch_size.uniform", "uniform draws fractions", "randint"),
    ("grid_search:\n  grid:\n    hp.batch_size: {randint: [0, 8]}\n", 3,
     "grid_search.grid.hp.batch_size.randint[0]", "0 is not at least 1", "at least 1"),
    (SIZE + "grid_search:\n  grid:\n    train.epochs: {choice: [1, 0]}\n", 4,
     "grid_search.grid.train.epochs.choice[1]", "0", "at least 1"),
    # pairs
    (SIZE + "grid_search: {pair: sometimes}\n", 2, "grid_search.pair", "'sometimes'", "auto, none"),
    (SIZE + "grid_search: {pair: [a]}\n", 2, "grid_search.pair[0]", "'a'", "[key, key]"),
    (SIZE + "grid_search:\n  grid: {ab: [1], c: [1]}\n  pair: [[ab, d]]\n", 4, "grid_search.pair[0][1]",
     "'d' is not in the grid", "ab, c"),
    (SIZE + "grid_search:\n  grid: {a: [1], c: {choice: [1]}}\n  pair: [[a, c]]\n", 4,
     "grid_search.pair[0][1]", "'c' is a distribution", "take it out"),
    (SIZE + "grid_search:\n  grid: {a: [1], c: [1], d: [1]}\n  pair: [[a, c], [d, a]]\n", 4,
     "grid_search.pair[1][1]", "'a' is in group 0 too", "one place"),
    (SIZE + "grid_search:\n  grid: {a: [1]}\n  pair: [[a]]\n", 4, "grid_search.pair[0]", "group of 1", "two"),
    (SIZE + "grid_search:\n  grid: {a: [1, 2], c: [1, 2, 3]}\n  pair: [[a, c]]\n", 4, "grid_search.pair[0]",
     "a has 2, c has 3", "same number"),
    # batch
    ("batch: {effective_batch_size: '128'}\n", 1, "batch.effective_batch_size", "'128' is a string", "quotes"),
    ("batch: {effective_batch_size: 0}\n", 1, "batch.effective_batch_size", "0", "at least 1"),
    ("batch:\n  start: 4\n", 1, "batch.effective_batch_size", "hp.batch_size",
     "batch: {effective_batch_size: 128}"),
    ("grid_search:\n  grid:\n    batch.effective_batch_size: [null, 8]\n", 1, "batch.effective_batch_size",
     "no batch size", "hp.batch_size"),
    ("batch:\n  effective_batch_size: 8\n  memory_fraction: 1.5\n", 3, "batch.memory_fraction", "1.5", "at most 1"),
    ("batch:\n  effective_batch_size: 8\n  memory_fraction: 0\n", 3, "batch.memory_fraction", "0", "above 0"),
    ("batch:\n  effective_batch_size: 8\n  memory_fraction: '0.5'\n", 3, "batch.memory_fraction",
     "'0.5' is a string", "remove the quotes"),
    ("batch:\n  effective_batch_size: 8\n  memory_budget: 24gib\n", 3, "batch.memory_budget", "'24gib'", "24GiB"),
    ("batch:\n  effective_batch_size: 8\n  memory_budget: 0.5\n", 3, "batch.memory_budget", "0.5", "24GiB"),
    ("batch:\n  effective_batch_size: 8\n  memory_budget: 0\n", 3, "batch.memory_budget", "less than", "24GiB"),
    ("batch:\n  effective_batch_size: 8\n  probe: false\n", 3, "batch.probe", "false is a boolean", "auto, off"),
    ("batch:\n  effective_batch_size: 8\n  search: gro\n", 3, "batch.search", "'gro'", "'grow'"),
    ("batch:\n  effective_batch_size: 8\n  exact: require\n", 3, "batch.exact", "'require'", "'required'"),
    ("batch:\n  effective_batch_size: 8\n  probe_timeout: .inf\n", 3, "batch.probe_timeout", "nfinity", "above 0"),
    # train
    (SIZE + "train:\n  epochs: 2.5\n", 3, "train.epochs", "2.5 is a number, not an integer", "at least 1"),
    (SIZE + "train:\n  warmup_steps:\n", 3, "train.warmup_steps", "is empty (null)", "at least 0"),
    (SIZE + "train:\n  num_steps: 0\n", 3, "train.num_steps", "0", "at least 1"),
    (SIZE + "train:\n  num_samples: 1e3\n", 3, "train.num_samples", "1000.0 is a number", "write 1000"),
    (SIZE + "train:\n  epochs: 3\n  num_steps: 9\n", 4, "train.num_steps",
     "train.epochs (3) and train.num_steps (9) each say how much", "keep one of epochs, num_steps"),
    (SIZE + "train:\n  num_samples: 5\n  num_steps: 9\n", 4, "train.num_steps",
     "train.num_samples (5) and train.num_steps (9)", "keep one of num_samples, num_steps"),
    (SIZE + "train: {epochs: 3}\ngrid_search:\n  grid:\n    train.num_samples: [5, 9]\n", 5,
     "grid_search.grid.train.num_samples", "train.epochs (3) and train.num_samples (5)", "keep one"),
    (SIZE + "train:\n  lr_scaling: cubic\n", 3, "train.lr_scaling", "'cubic'", "none, linear, sqrt"),
    (SIZE + "train:\n  lr_scaling: linear\n", 2, "train.base_batch_size", "is required: train.lr_scaling is linear",
     "the learning rate was chosen for"),
    (SIZE + "grid_search:\n  grid:\n    train.lr_scaling: [none, sqrt]\n", 1, "train.base_batch_size",
     "is required: train.lr_scaling is sqrt", "give the effective batch size"),
    (SIZE + "train:\n  base_batch_size: 64\n", 3, "train.base_batch_size", "64 has no effect",
     "write lr_scaling: linear or sqrt"),
    (SIZE + "train:\n  noise_scale: 1\n", 3, "train.noise_scale", "1", "true or false"),
    (SIZE + "train:\n  seed: -1\n", 3, "train.seed", "-1", "at least 0"),
    (SIZE + "train:\n  clip_norm: 0\n", 3, "train.clip_norm", "0", "above 0"),
    (SIZE + "train:\n  precision: fp12\n", 3, "train.precision", "'fp12'", "fp16"),
    (SIZE + "train:\n  precision: fp16\n  noise_scale: true\n", 4, "train.noise_scale", "train.precision: fp16",
     "use bf16 or fp32"),
    ("task: t.py:f\n" + SIZE + "train:\n  compile: true\n  function: t.py:g\n", 4, "train.compile",
     "compiled by the built-in loop", "compile in your function"),
    (SIZE + "memory:\n  checkpointing: all\n", 3, "memory.checkpointing", "'all' is no choice of blocks",
     "write none, blocks"),
    (SIZE + "memory:\n  checkpointing: 1.5\n", 3, "memory.checkpointing", "1.5 is no choice", "such as 0.5"),
    (SIZE + "memory:\n  checkpointing: []\n", 3, "memory.checkpointing", "[] is no choice", "class names"),
    (SIZE + "grid_search:\n  grid:\n    memory.checkpointing: [none, 2]\n", 4,
     "grid_search.grid.memory.checkpointing[1]", "2 is no choice", "class names"),
    (SIZE + "memory:\n  sharding: half\n", 3, "memory.sharding", "'half'", "optimizer"),
    (SIZE + "train: {function: a.py:f}\nmemory:\n  sharding: optimizer\ntask: a.py:g\n", 4,
     "memory.sharding", "built-in loop, and train.function is 'a.py:f'", "shard in your function"),
    (SIZE + "memory: {sharding: full}\ntrain:\n  noise_scale: true\n", 4, "train.noise_scale",
     "memory.sharding: full", "remove it, or use sharding: optimizer"),
    (SIZE + "memory: {sharding: full}\ntrain:\n  precision: fp16\n", 4, "train.precision",
     "memory.sharding: full", "use bf16"),
    (SIZE + "memory: {sharding: full}\ntrain:\n  compile: true\n", 4, "train.compile",
     "memory.sharding: full", "remove it"),
    (SIZE + "memory:\n  strategy: best\n", 3, "memory.strategy", "'best'", "auto"),
    (SIZE + "train: {function: a.py:f}\n", 1, "batch.probe", "'a.py:f'", "probe: off"),
    (SIZE + "train: 3\n", 2, "train", "3 is an integer, not a mapping", "key: value"),
    # trial
    (SIZE + "trial:\n  resources:\n    gpu: 1.5\n", 4, "trial.resources.gpu", "1.5 GPUs", "write 1 or 2"),
    (SIZE + "trial:\n  resources:\n    cpu: 0\n", 4, "trial.resources.cpu", "0", "above 0"),
    (SIZE + "trial:\n  resources:\n    TPU: 1\n", 4, "trial.resources.TPU", "'TPU'", "custom: {NAME: amount}"),
    (SIZE + "trial:\n  resources:\n    custom: {TPU: x}\n", 4, "trial.resources.custom.TPU", "'x'", "above 0"),
    (SIZE + "trial:\n  num_workers: 2\n  resources:\n    gpu: 0.5\n", 3, "trial.num_workers",
     "2 workers cannot share GPUs (0.5 each)", "write resources: {gpu: 1}"),
    # run
    (SIZE + "run:\n  storage: ftp://b/x\n", 3, "run.storage", "ftp:// is no storage", "s3://"),
    (SIZE + "run:\n  mode: biggest\n", 3, "run.mode", "'biggest'", "min, max"),
    (SIZE + "run:\n  metric: ' '\n", 3, "run.metric", "' ' is blank", "name"),
    (SIZE + "run:\n  num_samples: 3\n", 3, "run.num_samples", "3 samples", "distribution"),
    (SIZE + "run:\n  search: optna\n", 3, "run.search", "'optna'", "'optuna'"),
    (SIZE + "run:\n  search: hyperopt\n", 3, "run.search", "'hyperopt'", "random, optuna, bohb"),
    (SIZE + LR + "run:\n  search: optuna\n", 5, "run.num_samples", "trials in all", "num_samples: 20"),
    (SIZE + "run:\n  search: optuna\n  num_samples: 9\n", 3, "run.search", "nothing to search", "distribution"),
    (SIZE + "grid_search:\n  grid:\n    a: {choice: [1]}\n    b: {randint: [3, 4]}\nrun: {search: optuna, num_samples: 9}\n",
     6, "run.search", "nothing to search", "distribution"),
    (SIZE + "grid_search:\n  grid:\n    a/b: [1, 2]\nrun: {search: optuna, num_samples: 9}\n", 4, "grid_search.grid.a/b",
     "slash", "rename"),
    (SIZE + LR + "run:\n  search: bohb\n  num_samples: 9\n", 6, "run.search", "own scheduler", "scheduler: bohb"),
    (SIZE + LR + "run:\n  scheduler: bohb\n", 6, "run.scheduler", "own search", "search: bohb"),
    (SIZE + "run:\n  scheduler: pbtt\n", 3, "run.scheduler", "'pbtt' is no scheduler", "'pbt' or 'pb2'"),
    (SIZE + "run:\n  scheduler: zzz\n", 3, "run.scheduler", "'zzz' is no scheduler", "asha, median, hyperband, bohb, pbt, pb2"),
    (SIZE + "run:\n  scheduler: 5\n", 3, "run.scheduler", "5 is no scheduler", "asha"),
    (SIZE + "run:\n  scheduler:\n    name: ash\n", 4, "run.scheduler.name", "'ash'", "'asha'"),
    (SIZE + "run:\n  scheduler:\n    grace_period: 1\n", 3, "run.scheduler.name", "required", "asha or median"),
    (SIZE + "run:\n  scheduler:\n    name: asha\n    min_samples: 3\n", 5, "run.scheduler.min_samples",
     "min_samples (3) is for median", "remove"),
    (SIZE + "run:\n  scheduler:\n    name: median\n    reduction_factor: 3\n", 5,
     "run.scheduler.reduction_factor", "reduction_factor (3) is for asha", "remove"),
    (SIZE + "run:\n  scheduler:\n    name: asha\n    reduction_factor: 1\n", 5,
     "run.scheduler.reduction_factor", "1", "at least 2"),
    (SIZE + "run:\n  scheduler:\n    name: asha\n    grace_period: 9\n", 5, "run.scheduler.grace_period",
     "9 is more than the 1 epochs", "at most 1"),
    (SIZE + "run: {max_concurrent: 0}\n", 2, "run.max_concurrent", "0", "at least 1"),
    (SIZE + "run: {scheduler: hyperband, max_concurrent: 2}\n", 2, "run.max_concurrent", "hyperband compares", "remove"),
    (SIZE + "train: {num_steps: 9}\nrun: {scheduler: hyperband}\n", 3, "run.scheduler", "epochs into rungs", "epochs: 30"),
    (SIZE + "run: {scheduler: {name: asha, perturbation_interval: 2}}\n", 2, "run.scheduler.perturbation_interval",
     "perturbation_interval (2) is for pbt, pb2, not for asha", "remove"),
    (POPULATION + "run: {num_samples: 4, scheduler: {name: pbt, grace_period: 2}}\n", 6, "run.scheduler.grace_period",
     "grace_period (2) is for asha, median, not for pbt", "remove"),
    (POPULATION + "run: {num_samples: 4, scheduler: {name: pb2, resample_probability: 0.5}}\n", 6,
     "run.scheduler.resample_probability", "is for pbt, not for pb2", "remove"),
    (POPULATION + "run: {num_samples: 4, scheduler: {name: pbt, resample_probability: 1.5}}\n", 6,
     "run.scheduler.resample_probability", "1.5", "at most 1"),
    (POPULATION + "run: {num_samples: 4, scheduler: {name: pbt, quantile_fraction: 0.6}}\n", 6,
     "run.scheduler.quantile_fraction", "0.6", "at most 0.5"),
    (POPULATION + "run: {num_samples: 4, scheduler: {name: pbt, perturbation_interval: 9}}\n", 6,
     "run.scheduler.perturbation_interval", "9 epochs are not less than a trial's 9", "at most 8"),
    (SIZE + LR + "train: {epochs: 3}\nrun: {num_samples: 4, scheduler: pbt}\n", 6, "run.scheduler.perturbation_interval",
     "5 epochs are not less than a trial's 3", "at most 2"),
    (SIZE + LR + "run: {num_samples: 4, scheduler: pbt}\n", 5, "run.scheduler.perturbation_interval", "trial's 1", "more epochs"),
    (POPULATION + "run: {num_samples: 4, scheduler: pbt, search: optuna}\n", 6, "run.search", "optuna cannot choose", "pbt"),
    (POPULATION + "run: {num_samples: 4, scheduler: pb2, max_concurrent: 2}\n", 6, "run.max_concurrent", "pb2 compares", "turns"),
    (POPULATION + "run: {scheduler: pbt}\n", 6, "run.num_samples", "there is one", "8"),
    (SIZE + "train: {epochs: 9}\ngrid_search: {grid: {a: [1, 2]}}\nrun: {scheduler: pbt}\n", 4, "run.scheduler",
     "no grid key to perturb", "loguniform"),
    (POPULATION + "    model.type: [a, b]\nrun: {num_samples: 4, scheduler: pbt}\n", 6, "grid_search.grid.model.type",
     "may not change while a trial trains, and pbt", "one value"),
    (POPULATION + "    model.dropout: {uniform: [0, 1]}\nrun: {num_samples: 4, scheduler: pb2}\n", 6,
     "grid_search.grid.model.dropout", "may not change while a trial trains, and pb2", "one value"),
    (POPULATION + "    hp.batch_size: {randint: [1, 9]}\nrun: {num_samples: 4, scheduler: pbt}\n", 6,
     "grid_search.grid.hp.batch_size", "may not change", "one value"),
    (POPULATION + "    batch.effective_batch_size: [8, 16]\nrun: {num_samples: 4, scheduler: pbt}\n", 6,
     "grid_search.grid.batch.effective_batch_size", "may not change", "one value"),
    (SIZE + "train: {epochs: 9}\ngrid_search:\n  grid:\n    lr: {uniform: [0, 1]}\n    hp: [{batch_size: 2}, {batch_size: 4}]\n"
     "run: {num_samples: 4, scheduler: pbt}\n", 6, "grid_search.grid.hp", "may not change", "one value"),
    (POPULATION + "    a/b: [1, 2]\nrun: {num_samples: 4, scheduler: pb2}\n", 6, "grid_search.grid.a/b", "slash", "rename"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "path", "problem", "remedy"), ALONE, ids=[a[2] + a[3] for a in ALONE]
)
def test_each_fault_alone(
    tmp_path: Path, text: str, line: int | None, path: str, problem: str, remedy: str
) -> None:
    (fault,) = faults(tmp_path, text)
    assert (fault.line, fault.path) == (line, path)
    assert fault.source == str(tmp_path / "sweep.yaml")
    assert problem in fault.problem
    assert remedy in fault.remedy


def test_all_faults_come_at_once_in_the_files_order(tmp_path: Path) -> None:
    text = (
        "run: {mode: up, metric: 5}\n"
        "nam: x\n"
        "trial: {num_workers: 0}\n"
        "config:\n"
        "  eval: 1\n"
        "  hp: {batch_size: 1.0}\n"
        "  hp: 3\n"
        "grid_search:\n"
        "  pair: [[a, b], [z, a]]\n"
        "  grid:\n"
        "    b: []\n"
        "    a: [1, 2]\n"
        "    train.seed: [0, -1, x]\n"
        "    7: [1]\n"
    )
    found = faults(tmp_path, text, ["train.epochs=0", "oops"])
    assert [(fault.line, fault.path) for fault in found] == [
        (1, "run.mode"),
        (1, "run.metric"),
        (2, "nam"),
        (3, "trial.num_workers"),
        (5, "config.eval"),
        (6, "config.hp.batch_size"),
        (7, "config.hp"),
        (9, "grid_search.pair[1][0]"),
        (9, "grid_search.pair[1][1]"),
        (11, "grid_search.grid.b"),
        (13, "grid_search.grid.train.seed[1]"),
        (13, "grid_search.grid.train.seed[2]"),
        (14, "grid_search.grid"),
        (None, "train.epochs"),
        (None, "oops"),
    ]
    assert [fault.source for fault in found[-2:]] == ["--set", "--set"]


def test_the_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, SIZE)
    assert config.resolved() == {
        "name": "sweep",
        "task": None,
        "config": {},
        "grid_search": {"grid": {}, "pair": "auto"},
        "batch": {
            "effective_batch_size": 8,
            "memory_fraction": 0.9,
            "memory_budget": None,
            "probe": "auto",
            "search": "confirm",
            "start": None,
            "probe_timeout": 600.0,
            "exact": "warn",
            "group_by_length": True,
            "max_tokens": None,
            "knob": None,
            "start_from": None,
        },
        "train": {
            "epochs": None,
            "num_samples": None,
            "num_steps": None,
            "patience": None,
            "clip_norm": None,
            "lr_scaling": "none",
            "base_batch_size": None,
            "warmup_steps": 0,
            "noise_scale": False,
            "seed": 0,
            "precision": "fp32",
            "compile": False,
            "function": None,
            "loader_workers": 0,
        },
        "memory": {"strategy": "none", "checkpointing": "none", "sharding": "none", "channels_last": False},
        "trial": {
            "resources": {"cpu": 1.0, "gpu": 0.0, "accelerator_type": None, "custom": {}},
            "num_workers": 1,
            "max_failures": 3,
            "timeout": None,
            "grace": 30.0,
        },
        "run": {
            "metric": "val_loss",
            "mode": "min",
            "storage": "./runs",
            "num_samples": 1,
            "search": "random",
            "scheduler": None,
            "max_concurrent": None,
            "working_dir": None,
            "loggers": [],
        },
        "quick": {},
    }


FULL = """
name: full.sweep-1
task: examples/ucf101.py:build_task
config: {data: {root: /data, ratio: 1e-3}, hp: {batch_size: 16}}
grid_search:
  grid:
    model.type: [a, b]
    optimizer.name: adam
    blocks: [{depth: [1, 2]}, null]
    hp.lr: {loguniform: [1e-5, 1]}
    hp.k: {randint: [1, 5]}
    act: {choice: [relu, [1], {a: 1}]}
    batch.memory_budget: [1.5 GiB, null]
    train.clip_norm: [1, 2]
  pair: [[model.type, train.clip_norm], [blocks, batch.memory_budget]]
batch: {effective_batch_size: 128, memory_budget: 24GiB, probe: off, search: grow, start: 2, probe_timeout: 5}
train: {epochs: 30, patience: 7, clip_norm: 1, seed: 3, precision: bf16, function: my.mod:f, loader_workers: 2}
trial: {resources: {cpu: 2, gpu: 0.5, accelerator_type: T4, custom: {TPU: 1}}, num_workers: 1}
run: {metric: val_accuracy, mode: max, storage: /x, num_samples: 3, scheduler: asha, max_concurrent: 2, working_dir: .}
"""


def test_a_full_file_is_read_as_written(tmp_path: Path) -> None:
    config = load(tmp_path, FULL)
    grid = config.grid_search.grid
    assert list(grid) == [
        "model.type", "optimizer.name", "blocks", "hp.lr", "hp.k", "act", "batch.memory_budget", "train.clip_norm"
    ]  # fmt: skip
    assert grid["optimizer.name"] == ("adam",)
    assert grid["hp.lr"] == Distribution("loguniform", (1e-5, 1.0))
    assert grid["hp.k"] == Distribution("randint", (1, 5))
    assert grid["act"] == Distribution("choice", ("relu", [1], {"a": 1}))
    assert grid["batch.memory_budget"] == (3 * 2**29, None)
    assert config.batch.memory_budget == 24 * 2**30
    assert config.batch.probe == "off"
    assert config.config["data"]["ratio"] == 1e-3
    assert type(config.train.clip_norm) is float
    scheduler = config.run.scheduler
    assert scheduler is not None
    assert scheduler.resolved() == {"name": "asha", "grace_period": 1, "reduction_factor": 4}


@pytest.mark.parametrize(
    ("run", "resolved"),
    [
        ("{scheduler: {name: asha, reduction_factor: 2}}", {"grace_period": 1, "reduction_factor": 2}),
        ("{scheduler: median}", {"grace_period": 1, "min_samples": 3}),
        ("{scheduler: hyperband, num_samples: 8, search: optuna}", {"reduction_factor": 3}),
        ("{scheduler: bohb, num_samples: 8, search: bohb, max_concurrent: 2}", {"reduction_factor": 3}),
        (
            "{scheduler: pbt, num_samples: 8}",
            {"perturbation_interval": 5, "quantile_fraction": 0.25, "resample_probability": 0.25},
        ),
        (
            "{scheduler: {name: pb2, perturbation_interval: 8}, num_samples: 8}",
            {"perturbation_interval": 8, "quantile_fraction": 0.25},
        ),
    ],
)
def test_a_scheduler_has_its_own_settings_with_rays_defaults(
    tmp_path: Path, run: str, resolved: dict[str, Any]
) -> None:
    config = load(tmp_path, POPULATION + f"run: {run}\n")
    assert config.run.scheduler is not None
    assert list(config.run.scheduler.resolved().items())[1:] == list(resolved.items())
    assert load_config(config.resolved()) == config


def test_a_population_may_differ_in_what_a_checkpoint_does_not_hang_on(tmp_path: Path) -> None:
    fixed = "    model.type: [a]\n    batch.start: {choice: [4]}\n"
    varied = "    hp: [{momentum: 0.5}, {momentum: 0.9}]\n    train.seed: [1, 2]\n"
    text = POPULATION.replace("hp.lr", "optimizer.lr") + fixed + varied
    config = load(tmp_path, text + "run: {scheduler: pbt}\n")
    assert num_trials(config) == 4


@pytest.mark.parametrize(
    "text",
    [
        FULL,
        SIZE,
        SIZE + "run: {scheduler: {name: median, grace_period: 3}}\ntrain: {epochs: 3}\n",
        SIZE + "grid_search: {pair: none}\n",
        SIZE + "train: {num_samples: 1000, lr_scaling: sqrt, base_batch_size: 64, warmup_steps: 5}\n",
        SIZE + "grid_search: {grid: {train.num_steps: [10, 20]}}\n",
    ],
)
def test_the_resolved_config_can_be_stored_and_read_again(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    resolved = config.resolved()
    assert load_config(resolved) == config
    assert load_config(json.loads(json.dumps(resolved))) == config
    stored = tmp_path / "stored.yaml"
    stored.write_text(yaml.safe_dump(resolved, sort_keys=False))
    again = load_config(stored)
    assert again == config
    assert list(again.grid_search.grid) == list(config.grid_search.grid)
    assert load(tmp_path, text, ["train.seed=99"]) != config
    resolved["train"]["epochs"] = 77
    resolved["config"]["new"] = 1
    assert config.train.epochs != 77
    assert "new" not in config.config


def test_a_dict_is_copied_and_its_faults_have_no_lines() -> None:
    given_data: dict[str, Any] = {
        "config": {"tags": ["x"]},
        "grid_search": {"grid": {"m": ("a", "b")}, "pair": "auto"},
        "batch": {"effective_batch_size": 8},
    }
    config = load_config(given_data)
    given_data["config"]["tags"].append("y")
    assert config.config == {"tags": ["x"]}
    assert config.grid_search.grid == {"m": ("a", "b")}
    assert config.source_path is None
    with pytest.raises(ConfigError) as caught:
        load_config({"batch": {"effective_batch_size": 8, "start": "4"}, "train": {"seed": object()}})
    assert [(f.source, f.line, f.path) for f in caught.value.faults] == [
        ("<config>", None, "train.seed"),
        ("<config>", None, "batch.start"),
    ]


def test_the_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path, SIZE)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("trial.resources.gpu=0.5", ("trial", "resources", "gpu"), 0.5),
        ("run.storage=/x=y", ("run", "storage"), "/x=y"),
        ("batch.probe=off", ("batch", "probe"), "off"),
        ("grid_search.grid.hp.batch_size=[8, 4]", ("grid_search", "grid", "hp.batch_size"), [8, 4]),
        ("grid_search.grid={a.b: 1}", ("grid_search", "grid"), {"a.b": [1]}),
        ("config.hp.lr=1e-3", ("config", "hp", "lr"), 1e-3),
        ("config.x=", ("config", "x"), None),
        ("train.patience=null", ("train", "patience"), None),
        ("name=yes", ("name",), "yes"),
    ],
)
def test_overrides(tmp_path: Path, override: str, path: tuple[str, ...], value: Any) -> None:
    text = SIZE + "config:\ntrain: {epochs: 1, patience: 2}\ngrid_search: {grid: {hp.batch_size: [1]}}\n"
    found: Any = load(tmp_path, text, [override]).resolved()
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("override", "path", "problem"),
    [
        ("train.epochs", "train.epochs", "'train.epochs' is not key=value"),
        ("=3", "", "'=3' is not key=value"),
        ("a..b=3", "a..b", "'a..b=3' is not key=value"),
        ("train.epochs=[1", "train.epochs", "not valid YAML"),
        ("config.a={b: 1, b: 2}", "config.a.b", "given twice"),
        ("train.epochs.x=1", "train.epochs.x", "train.epochs is not a mapping"),
        ("train.epocs=1", "train.epocs", "unknown key 'epocs'"),
        ("train.epochs=x", "train.epochs", "'x' is a string"),
        ("grid_search.grid.hp.q=[]", "grid_search.grid.hp.q", "empty list"),
        ("grid_search.grid.hp.batch_size=[8, 0]", "grid_search.grid.hp.batch_size[1]", "0"),
    ],
)
def test_faults_of_overrides_name_their_source(
    tmp_path: Path, override: str, path: str, problem: str
) -> None:
    (fault,) = faults(tmp_path, SIZE + "train: {epochs: 1}\n", [override])
    assert (fault.source, fault.line, fault.path) == ("--set", None, path)
    assert problem in fault.problem
    assert fault.remedy


QUICK = (
    SIZE
    + """\
train: {epochs: 30}
quick:
  train.epochs: 2
  config.data.share: 0.1
  grid_search.grid.model.type: [small]
"""
)


def test_quick_values_come_in_place_of_the_files_and_before_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, QUICK)
    whole, quick = load_config(path), load_config(path, quick=True)
    assert (whole.train.epochs, whole.config, whole.grid_search.grid, whole.is_quick) == (30, {}, {}, False)
    assert (quick.train.epochs, quick.config, quick.is_quick) == (2, {"data": {"share": 0.1}}, True)
    assert quick.grid_search.grid == {"model.type": ("small",)}
    assert load_config(path, quick=True, overrides=["train.epochs=5"]).train.epochs == 5
    assert load_config(quick.resolved()) == quick  # as a run directory has it


def test_quick_needs_a_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say what a quick trial is; add a section such as quick:"):
        load_config(write(tmp_path, SIZE), quick=True)


@pytest.mark.parametrize(
    ("key", "is_quick", "path", "problem"),
    [
        ("train..epochs: 2", False, "quick.train..epochs", "'train..epochs' is no key"),
        ("train..epochs: 2", True, "quick.train..epochs", "'train..epochs' is no key"),
        ("quick.name: x", False, "quick.quick.name", "'quick.name' is no key"),
        ("train.epoch: 2", True, "train.epoch", "unknown key 'epoch'"),
        ("train.epochs: x", True, "train.epochs", "'x' is a string"),
        ("train.epochs.x: 2", True, "quick.train.epochs.x", "train.epochs is not a mapping"),
    ],
)
def test_faults_of_quick_values_name_their_line(
    tmp_path: Path, key: str, is_quick: bool, path: str, problem: str
) -> None:
    file = write(tmp_path, SIZE + f"train: {{epochs: 1}}\nquick:\n  {key}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, quick=is_quick)
    (fault,) = caught.value.faults
    assert (fault.path, str(fault).startswith(f"{file}:4: ")) == (path, True)
    assert problem in fault.problem
    assert fault.remedy


@pytest.mark.parametrize("section", ["3", "[train.epochs]"])
@pytest.mark.parametrize("is_quick", [False, True])
def test_a_quick_section_is_a_mapping(tmp_path: Path, section: str, is_quick: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, SIZE + f"quick: {section}\n"), quick=is_quick)
    (fault,) = caught.value.faults
    assert (fault.path, fault.line) == ("quick", 2)


@pytest.mark.parametrize(
    "text",
    [
        "config: {hp: {batch_size: 4}}\n",
        "grid_search: {grid: {hp.batch_size: [4]}}\n",
        "grid_search: {grid: {hp: [{batch_size: 4}, {batch_size: 8}]}}\n",
        "grid_search: {grid: {hp.batch_size: {choice: [4, 8]}}}\n",
        "grid_search: {grid: {batch.effective_batch_size: [4]}}\n",
        "grid_search: {grid: {batch.effective_batch_size: [null, 4]}}\nconfig: {hp: {batch_size: 4}}\n",
        "batch: {probe: off}\ntrain: {function: a.py:f}\n",
        "batch: {probe: off}\ngrid_search: {grid: {train.function: [a.py:f, m:g]}}\n",
    ],
)
def test_ways_to_have_a_batch_size(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "needs_task"),
    [
        (SIZE, True),
        (SIZE + "task: a:f\n", False),
        ("batch: {probe: off}\ntrain: {function: a.py:f}\n", False),
        ("batch: {probe: off}\ngrid_search: {grid: {train.function: [a.py:f]}}\n", False),
    ],
)
def test_whether_python_has_to_give_the_task(tmp_path: Path, text: str, needs_task: bool) -> None:
    assert load(tmp_path, text).needs_task is needs_task


@pytest.mark.parametrize("task", ["m:f", "a.b_c.d:f", "x.py:f", "../a-b/x y.py:f", "/abs/x.py:build_task"])
def test_names_of_functions(tmp_path: Path, task: str) -> None:
    assert load(tmp_path, SIZE + f"task: {task}\n").task == task


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_whatever_stands_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    words = st.sampled_from(
        ["", ".", "a.b", "eval", "uniform", "choice", "name", "auto", "none", "off", "asha"]
    )
    junk = st.recursive(
        st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=5,
    )
    content: Any = load_config(yaml.safe_load(FULL.replace("off", "'off'").replace("1e-5", "0.1"))).resolved()
    for path in data.draw(st.lists(st.sampled_from(places(content)[1:]), min_size=1, max_size=3)):
        target = content
        try:
            for part in path[:-1]:
                target = target[part]
            target[path[-1]] = data.draw(junk)
        except (TypeError, KeyError, IndexError):
            continue
    try:
        config = load_config(content)
    except ConfigError as error:
        found = error.faults
    else:
        assert load_config(config.resolved()) == config
        assert len(expand_trials(config)) == build_plan(config).num_trials // config.run.num_samples
        return
    assert found
    assert all(fault.problem and fault.remedy for fault in found)
    assert len({str(fault) for fault in found}) == len(found)


UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@given(st.integers(1, 9999), st.integers(0, 99), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]))
def test_memory_sizes(whole: int, hundredths: int, unit: str, space: str) -> None:
    text = f"{whole}.{hundredths:02d}{space}{unit}"
    config = load_config({"batch": {"effective_batch_size": 1, "memory_budget": text}})
    assert config.batch.memory_budget == round((whole + hundredths / 100) * UNITS[unit])


def test_the_project_root_is_the_nearest_marked_folder(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    path = write(inner, SIZE)
    assert find_project_root(path) == tmp_path
    (tmp_path / "a" / ".git").mkdir()
    config = load_config(path)
    assert config.project_root == tmp_path / "a"
    assert config.source_path == path


def test_loading_a_sweep_file_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    code = (
        "import sys\n"
        "from tune_easytrain import config, search_space, sweep_plan\n"
        f"sweep_plan.build_plan(config.load_config({str(path)!r}))\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'ray', 'pandas', 'numpy'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
