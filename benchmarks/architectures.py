"""Tasks of many architectures, to hold the memory estimate against real peaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tune_easytrain.task import Task

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import ucf101

Build = Callable[[], nn.Module]


def video(name: str) -> Task:
    """One of torchvision's video models at its published input."""
    return ucf101.build_task({"model": {"type": name}, "optimizer": {"name": "adam"}})


def images(build: Build, size: int = 224, optimizer: Any = torch.optim.AdamW) -> Task:
    """Images of `size` × `size` pixels and 1000 classes."""
    return Task(
        model=build,
        loss=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda model: optimizer(model.parameters()),
        train_data=list,
        worst_case=lambda m: (torch.randn(m, 3, size, size), torch.zeros(m, dtype=torch.long)),
    )


def language(build: Build, length: int) -> Task:
    """Sequences of `length` tokens, each predicted from those before it."""

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        output = model(tokens)
        logits = getattr(output, "logits", output)[:, :-1]
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    return Task(
        model=build,
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        train_data=list,
        worst_case=lambda m: torch.zeros(m, length, dtype=torch.long),
    )


def segmentation() -> Task:
    """A U-Net with group norm on 256 × 256 pixels."""
    return Task(
        model=UNet,
        loss=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda model: torch.optim.Adam(model.parameters()),
        train_data=list,
        worst_case=lambda m: (torch.randn(m, 3, 256, 256), torch.zeros(m, 256, 256, dtype=torch.long)),
    )


def sequence_to_sequence() -> Task:
    """T5 of 60 million parameters: 512 tokens to 128."""

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        result: Tensor = model(input_ids=tokens, labels=tokens[:, :128].contiguous()).loss
        return result

    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}
    return Task(
        model=hugging_face("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **sizes),
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        train_data=list,
        worst_case=lambda m: torch.ones(m, 512, dtype=torch.long),
    )


class UNet(nn.Module):
    """Three levels down and up, 64 channels at the top."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [_double(3, width), _double(width, 2 * width), _double(2 * width, 4 * width)]
        )
        self.bottom = _double(4 * width, 8 * width)
        self.up = nn.ModuleList(
            [_double(12 * width, 4 * width), _double(6 * width, 2 * width), _double(3 * width, width)]
        )
        self.head = nn.Conv2d(width, 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(m, 3, S, S) to (m, 21, S, S)."""
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear")
            x = block(torch.cat([x, kept.pop()], 1))
        result: Tensor = self.head(x)
        return result


def _double(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (channels, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
    return nn.Sequential(*layers)


class Recurrent(nn.Module):
    """A language model of two recurrent layers."""

    def __init__(self, kind: str, vocabulary: int, width: int, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = getattr(nn, kind)
        self.layers = layer(width, width, 2, dropout=0.2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(width * (2 if bidirectional else 1), vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(m, T) tokens to (m, T, vocabulary) logits."""
        result: Tensor = self.head(self.layers(self.embedding(tokens))[0])
        return result


class EncoderDecoder(nn.Module):
    """torch's own transformer with a causal decoder."""

    def __init__(self, vocabulary: int = 32000, width: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, 8, 6, 6, 2048, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(m, T) tokens to (m, T, vocabulary) logits."""
        x = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=x.device)
        result: Tensor = self.head(self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True))
        return result


def torchvision_model(name: str) -> Build:
    """Return the builder of one of torchvision's models."""

    def build() -> nn.Module:
        from torchvision.models import get_model

        model: nn.Module = get_model(name, weights=None)
        return model

    return build


def hugging_face(model: str, config: str, *, checkpointing: bool = False, **options: Any) -> Build:
    """Return the builder of one of transformers' models."""

    def build() -> nn.Module:
        import transformers

        made: Any = getattr(transformers, model)(getattr(transformers, config)(use_cache=False, **options))
        if checkpointing:
            made.gradient_checkpointing_enable()
        result: nn.Module = made
        return result

    return build


_IMAGE_MODELS = (
    "resnet50",
    "convnext_tiny",
    "efficientnet_b0",
    "mobilenet_v3_large",
    "vgg16",
    "densenet121",
    "vit_b_16",
)
_LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def architectures() -> dict[str, Callable[[], Task]]:
    """Return every task's builder by name."""
    gpt2 = "GPT2LMHeadModel", "GPT2Config"
    llama = "LlamaForCausalLM", "LlamaConfig"
    tasks: dict[str, Callable[[], Task]] = {name: lambda name=name: video(name) for name in ucf101.FRAMES}
    for name in _IMAGE_MODELS:
        tasks[name] = lambda name=name: images(torchvision_model(name))
    return tasks | {
        "resnet50_sgd": lambda: images(torchvision_model("resnet50"), optimizer=sgd),
        "swin_v2_t": lambda: images(torchvision_model("swin_v2_t"), size=256),
        "unet": segmentation,
        "lstm": lambda: language(lambda: Recurrent("LSTM", 30000, 650), 256),
        "gru_bi": lambda: language(lambda: Recurrent("GRU", 1000, 512, bidirectional=True), 400),
        "gpt2_1k": lambda: language(hugging_face(*gpt2), 1024),
        "gpt2_4k": lambda: language(hugging_face(*gpt2, n_positions=4096, n_layer=6), 4096),
        "llama_gqa": lambda: language(
            hugging_face(*llama, vocab_size=128256, num_key_value_heads=4, **_LLAMA), 2048
        ),
        "llama_gc": lambda: language(
            hugging_face(*llama, checkpointing=True, vocab_size=32000, num_key_value_heads=16, **_LLAMA), 2048
        ),
        "bert": lambda: language(hugging_face("BertForMaskedLM", "BertConfig"), 512),
        "t5": sequence_to_sequence,
        "encdec": lambda: language(EncoderDecoder, 512),
    }
