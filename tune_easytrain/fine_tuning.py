"""`FineTuning`: how a language model is fine-tuned, and what can be changed so that it takes less memory.

No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tune_easytrain.errors import BadInputError
from tune_easytrain.language_models import LanguageModel
from tune_easytrain.settings import Sharding

LanguageTask = Literal["classification", "generation", "qa"]
Method = Literal["full", "lora"]
NumberFormat = Literal["bf16", "fp32"]

BYTES_PER_NUMBER = {"bf16": 2, "fp32": 4}
DEFAULT_LORA_RANK = 16
_DEVICES = (2, 4, 8)
_SHORTEST_SEQUENCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """One way to fine-tune a language model with AdamW.

    Attributes:
        model: its shape.
        task: what it learns: a class per sequence, the next token, or where in a text an answer is.
        method: `full` trains all weights; `lora` trains adapters of `lora_rank` at every linear layer of the
            blocks (Hu et al. 2021, arXiv:2106.09685) and the task's own head.
        precision: the format forward passes run in; `bf16` is autocast, as `train.precision` has it.
        weights: the format that weights are held in; with `lora` that of the frozen ones.
        checkpointing: whether the backward pass computes every block again.
        sharding: what the devices split among them, as `memory.sharding` says it.
        num_devices: how many train together.
        sequence_length: tokens of the longest sample.
    """

    model: LanguageModel
    task: LanguageTask
    method: Method = "full"
    precision: NumberFormat = "bf16"
    weights: NumberFormat = "fp32"
    checkpointing: bool = False
    sharding: Sharding = "none"
    num_devices: int = 1
    sequence_length: int = 512
    lora_rank: int = DEFAULT_LORA_RANK

    def __post_init__(self) -> None:
        for option, value, valid in (
            ("--task", self.task, LanguageTask),
            ("--method", self.method, Method),
            ("--precision", self.precision, NumberFormat),
            ("--weights", self.weights, NumberFormat),
            ("--sharding", self.sharding, Sharding),
        ):
            if value not in get_args(valid):
                raise BadInputError(f"{option}: unknown name {value!r}; valid: {', '.join(get_args(valid))}")
        if self.sharding != "none" and self.num_devices == 1:
            raise BadInputError(f"--sharding {self.sharding}: there is one device; add --devices 2 or more")
        if self.precision == "fp32" and self.weights == "bf16":
            raise BadInputError("--weights bf16 computes in bf16; give --precision bf16 with it")
        longest = self.model.longest_sequence
        if self.sequence_length > longest:
            raise BadInputError(
                f"--sequence-length {self.sequence_length}: {self.model.published_as} takes at most "
                f"{longest} tokens; give fewer"
            )

    def describe(self) -> str:
        """Return the way in words."""
        parts = [
            "full fine-tuning" if self.method == "full" else f"LoRA of rank {self.lora_rank}",
            f"{self.task}, {self.sequence_length} tokens",
            self._formats(),
            "AdamW (fused)",
        ]
        if self.checkpointing:
            parts.append("checkpointing")
        if self.num_devices > 1:
            what = {"none": "nothing", "optimizer": "optimizer state", "full": "everything"}[self.sharding]
            parts.append(f"{self.num_devices} devices that split {what}")
        return "; ".join(parts)

    def _formats(self) -> str:
        if self.precision == "fp32":
            return "fp32"
        if self.method == "lora":
            return f"bf16 autocast, frozen weights in {self.weights}, adapters in fp32"
        if self.weights == "fp32":
            return "bf16 autocast over fp32 weights"
        return "all in bf16, without fp32 weights to add small updates to"

    def key_value_cache_bytes(self, microbatch_size: int) -> int:
        """Return what generation keeps of a micro-batch's keys and values at most, in bytes."""
        per_sample = self.model.key_value_cache_bytes(self.sequence_length, BYTES_PER_NUMBER[self.precision])
        return microbatch_size * per_sample

    def as_json(self) -> dict[str, Any]:
        """Return what scripts get, by the names of the command line's options."""
        return {
            "model": self.model.size,
            "published_as": self.model.published_as,
            "task": self.task,
            "method": self.method,
            "precision": self.precision,
            "weights": self.weights,
            "checkpointing": self.checkpointing,
            "sharding": self.sharding,
            "devices": self.num_devices,
            "sequence_length": self.sequence_length,
            "lora_rank": self.lora_rank if self.method == "lora" else None,
        }


@dataclass(frozen=True, slots=True)
class ResidentMemory:
    """What one device holds all through training, in bytes, and the parameters on all devices together."""

    num_parameters: int
    num_trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it; the step's counters, a number per tensor, are left out."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_state_bytes


@dataclass(frozen=True, slots=True)
class Change:
    """Something that makes fine-tuning take less memory.

    Attributes:
        name: what it is, in words.
        option: how the command line asks for it.
        values: the same as attributes of `FineTuning`.
    """

    name: str
    option: str
    values: dict[str, Any]

    def apply(self, fine_tuning: FineTuning) -> FineTuning:
        """Return the way with the change made."""
        return replace(fine_tuning, **self.values)


def default_weights(method: str, precision: NumberFormat) -> NumberFormat:
    """Return the format that weights are held in unless asked otherwise.

    Trained weights are fp32: in bf16 most updates are too small to change them. Frozen ones need no more than
    what they are computed in.
    """
    return precision if method == "lora" else "fp32"


def possible_changes(given: FineTuning) -> tuple[tuple[Change, ...], ...]:
    """Return what can be changed, kinds in the order in which they are tried, in each the mildest first.

    The order: checkpointing, LoRA, bf16 weights, everything split among more devices, shorter sequences. What
    is so already is left out.
    """
    kinds: list[list[Change]] = []
    if not given.checkpointing:
        kinds.append([Change("checkpointing", "--checkpointing", {"checkpointing": True})])
    if given.method == "full":
        weights = default_weights("lora", given.precision)
        lora = {"method": "lora", "weights": weights}
        kinds.append([Change(f"LoRA of rank {given.lora_rank}", f"--method lora --weights {weights}", lora)])
    if given.weights == "fp32":
        bf16 = {"precision": "bf16", "weights": "bf16"}
        kinds.append([Change("bf16 weights", "--precision bf16 --weights bf16", bf16)])
    kinds.append([_split_among(n) for n in _DEVICES if n > given.num_devices or _can_split(given, n)])
    halves = (given.sequence_length // 2, given.sequence_length // 4)
    kinds.append([_shortened(length) for length in halves if length >= _SHORTEST_SEQUENCE])
    return tuple(tuple(kind) for kind in kinds if kind)


def _can_split(given: FineTuning, num_devices: int) -> bool:
    return num_devices == given.num_devices and given.sharding != "full"


def _split_among(num_devices: int) -> Change:
    values = {"sharding": "full", "num_devices": num_devices}
    return Change(f"split among {num_devices} devices", f"--sharding full --devices {num_devices}", values)


def _shortened(length: int) -> Change:
    return Change(f"{length} tokens", f"--sequence-length {length}", {"sequence_length": length})
