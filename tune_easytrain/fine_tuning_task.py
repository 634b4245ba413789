"""The task of fine-tuning a language model: transformers' own classes, built from a shape without weights.

It is for estimates: there is no data, and the worst case is a batch of samples as long as allowed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from tune_easytrain.estimate import estimate_task
from tune_easytrain.fine_tuning import FineTuning, ResidentMemory
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.optimizer_shards import assign_owners
from tune_easytrain.strategies import with_strategies
from tune_easytrain.task import Batch, Task

_CLASSES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "generation": transformers.AutoModelForCausalLM,
    "qa": transformers.AutoModelForQuestionAnswering,
}
_PEFT_TASKS = {
    "classification": peft.TaskType.SEQ_CLS,
    "generation": peft.TaskType.CAUSAL_LM,
    "qa": peft.TaskType.QUESTION_ANS,
}
_ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PADDING = 0
_ONE_DEVICE: dict[str, Any] = {"sharding": "none", "num_devices": 1}


def estimate_fine_tuning(fine_tuning: FineTuning) -> MemoryEstimate:
    """Return the memory of one device by micro-batch size, traced without weights and without a GPU.

    Raises EstimateError where it cannot be traced.
    """
    return estimate_task(
        build_fine_tuning_task(fine_tuning),
        precision=fine_tuning.precision,
        sharding=fine_tuning.sharding,
        num_workers=fine_tuning.num_devices,
    )


def build_fine_tuning_task(fine_tuning: FineTuning) -> Task:
    """Return the task of one way to fine-tune; nothing is built yet."""
    generates = fine_tuning.task == "generation"
    task = Task(
        model=partial(build_language_model, fine_tuning),
        loss=lambda model, batch: model(**batch).loss,
        optimizer=lambda model: torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad], fused=True
        ),
        train_data=_no_data,
        worst_case=partial(_worst_case, fine_tuning),
        generate=_generate if generates else None,
    )
    return with_strategies(task, checkpointing="blocks" if fine_tuning.checkpointing else "none")


def build_language_model(fine_tuning: FineTuning) -> nn.Module:
    """Build the model, with adapters where there are to be some, on torch's default device."""
    shape = fine_tuning.model
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocabulary_size,
        max_position_embeddings=shape.longest_sequence,
        tie_word_embeddings=shape.ties_embeddings,
        pad_token_id=_PADDING,
        use_cache=False,
    )
    auto_class: Any = _CLASSES[fine_tuning.task]
    model: nn.Module = auto_class.from_config(
        config, attn_implementation="sdpa", dtype=_DTYPES[fine_tuning.weights]
    )
    if fine_tuning.method == "full":
        return model
    adapters = peft.LoraConfig(
        r=fine_tuning.lora_rank,
        lora_alpha=2 * fine_tuning.lora_rank,
        target_modules=_ADAPTED,
        task_type=_PEFT_TASKS[fine_tuning.task],
    )
    return peft.get_peft_model(model, adapters)


def resident_memory(fine_tuning: FineTuning) -> ResidentMemory:
    """Return what the device that holds the most has of weights, gradients and AdamW's two moments."""
    parameters = _parameters(replace(fine_tuning, checkpointing=False, sequence_length=1, **_ONE_DEVICE))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_devices = fine_tuning.num_devices if fine_tuning.sharding == "full" else 1
    gradients = [_part_bytes(parameter, num_devices) for parameter in trained]
    stepped = sum(gradients)
    if fine_tuning.sharding == "optimizer":
        owners = assign_owners(gradients, fine_tuning.num_devices)
        loads = [0] * fine_tuning.num_devices
        for owner, num_bytes in zip(owners, gradients, strict=True):
            loads[owner] += num_bytes
        stepped = max(loads)
    return ResidentMemory(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_trained=sum(parameter.numel() for parameter in trained),
        weight_bytes=sum(_part_bytes(parameter, num_devices) for parameter in parameters),
        gradient_bytes=sum(gradients),
        optimizer_state_bytes=2 * stepped,
    )


@lru_cache(maxsize=4)
def _parameters(fine_tuning: FineTuning) -> tuple[nn.Parameter, ...]:
    """Return the model's parameters without their memory; they depend on neither devices nor lengths."""
    with torch.device("meta"):
        return tuple(build_language_model(fine_tuning).parameters())


def _part_bytes(parameter: Tensor, num_devices: int) -> int:
    """Return the largest part of a parameter, which is split by rows."""
    rows = -(-parameter.shape[0] // num_devices)
    return rows * parameter[0].numel() * parameter.element_size()


def _no_data() -> Dataset[Any]:
    raise NotImplementedError("this task is for estimates, which need no data where there is a worst case")


def _worst_case(fine_tuning: FineTuning, num_samples: int) -> Batch:
    """Return samples of the longest length, the last of them one token shorter where padding takes more.

    With padding attention gets a mask, which takes memory. Without it, transformers leaves heads that share
    keys to PyTorch, whose only kernel for them in fp32 keeps the whole matrix.
    """
    shape, length = fine_tuning.model, fine_tuning.sequence_length
    tokens = torch.ones(num_samples, length, dtype=torch.long)
    is_padded = fine_tuning.precision == "bf16" or shape.num_heads == shape.num_key_value_heads
    lengths = length - is_padded * (torch.arange(num_samples) == num_samples - 1).long()
    batch = {"input_ids": tokens, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}
    targets: dict[str, dict[str, Any]] = {
        "classification": {"labels": torch.zeros(num_samples, dtype=torch.long)},
        "generation": {"labels": tokens},
        "qa": dict.fromkeys(("start_positions", "end_positions"), torch.zeros(num_samples, dtype=torch.long)),
    }
    return batch | targets[fine_tuning.task]


def _generate(model: nn.Module, batch: Batch) -> Tensor:
    """Generate the last token after all those before it: the cache is as large as it ever is."""
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    read = model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=True, logits_to_keep=1)
    last = model(
        input_ids=read.logits[:, -1:].argmax(-1),
        attention_mask=mask,
        past_key_values=read.past_key_values,
        use_cache=True,
        logits_to_keep=1,
    )
    generated: Tensor = last.logits[:, -1].argmax(-1)
    return generated
