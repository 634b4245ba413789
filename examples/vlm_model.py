"""The model of vlm_true_batch.py: LLaVA, a batch in one pass or sample by sample, with fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from vlm_questions import BOS, EOS, IGNORED, IMAGE, PAD, PATCH, Batch, split_samples

from tune_easytrain import BadInputError

CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "projection_dim": 768,
}  # fmt: skip
TINY_CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 56, "projection_dim": 32,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[dict[str, int], tuple[int, int, int, int, int, int]]] = {
    "tiny": (TINY_CLIP, (64, 128, 3, 4, 4, 64)),
    "llava_smollm_360m": (CLIP_LARGE, (960, 2560, 32, 15, 5, 32064)),
    "llava_tinyllama_1b": (CLIP_LARGE, (2048, 5632, 22, 32, 4, 32064)),
    "llava_1_5_7b": (CLIP_LARGE, (4096, 11008, 32, 32, 32, 32064)),
}
"""CLIP's sizes, and the decoder's: width, inner width, layers, heads, heads of keys, vocabulary."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of red, green and blue."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FEATURE_LAYER = -2
"""The layer of the tower that the projector is given, as in LLaVA-1.5."""


class VisionTokensError(BadInputError, ValueError):
    """The vision tokens of a batch are not where one forward pass needs them to be."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the decoder says after the image, for m samples that passed through it together.

    `logits` (m, T, vocabulary) and `features` (m, T, width) are where each of the T tokens after the image is
    predicted, `targets` (m, T) are those tokens, IGNORED where no answer is. `num_vision_tokens` is what is
    left of each image in the last layer.
    """

    logits: Tensor
    features: Tensor
    targets: Tensor
    num_vision_tokens: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """A batch as the decoder gets it: `embeddings` (m, L', width), `attention_mask` and `labels` (m, L).

    The `num_vision_tokens` of each image begin at `start` in all of them; L' is less than L where some were
    merged. `num_text_tokens` come after the image.
    """

    embeddings: Tensor
    attention_mask: Tensor
    labels: Tensor
    start: int
    num_vision_tokens: int
    num_text_tokens: int

    @property
    def vision_positions(self) -> range:
        """The positions of the vision tokens, the same in every sample."""
        return range(self.start, self.start + self.num_vision_tokens)


class VisionLanguageModel(nn.Module):
    """LLaVA, with a batch in one pass or sample by sample, and with fewer vision tokens if asked for."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        llava: nn.Module,
        *,
        is_true_batch: bool = False,
        is_frozen: bool = False,
        merge_keep: float = 1.0,
        prune_layers: Sequence[int] = (),
        prune_keep: float = 0.5,
    ) -> None:
        super().__init__()
        self.llava = llava
        self.is_true_batch, self.is_frozen = is_true_batch, is_frozen
        self.merge_keep, self.prune_layers, self.prune_keep = merge_keep, tuple(prune_layers), prune_keep
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch, *, is_reduced: bool = True) -> list[Answers]:
        """Return the answers of a batch: of all samples together in a true batch, else of each by itself.

        Without `is_reduced` no vision token is merged or pruned. Raises VisionTokensError where a true batch
        cannot be one.
        """
        if self.is_true_batch:
            return [self._decode(self.preprocess_batch(batch, is_reduced=is_reduced), is_reduced)]
        if batch["pixels"].device.type == "meta" and len(batch["pixels"]) > 1:
            raise RuntimeError("samples pass through one by one, by other operations for each number of them")
        return [self._decode(self._embed(sample, is_reduced), is_reduced) for sample in split_samples(batch)]

    def preprocess_batch(self, batch: Batch, *, is_reduced: bool = True) -> Embedded:
        """Embed all samples of a batch at once.

        Raises BadInputError without true batches, VisionTokensError where images are not all of one size, or
        their tokens not all at the same positions.
        """
        if not self.is_true_batch:
            raise BadInputError(
                "preprocess_batch needs images of one size: set model.enable_true_batch: true (or "
                "backbone_settings.mllm_settings.enable_true_batch: true)"
            )
        check_sizes(batch["sizes"])
        return self._embed(batch, is_reduced)

    def count_vision_tokens(self, height: int, width: int) -> int:
        """How many tokens of an image are left in the last layer."""
        count = num_merged((height // PATCH) * (width // PATCH), self.merge_keep)
        for _ in self.prune_layers:
            count = num_pruned(count, self.prune_keep)
        return count

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return vision tokens (m, (H // 14) (W // 14), width) of images (m, 3, H, W), uint8."""
        tower: Any = self.llava.get_submodule("model.vision_tower")
        images = ((pixels - self.mean) / self.std).to(tower.dtype)
        with torch.no_grad() if self.is_frozen else nullcontext():
            # Positions are those of another grid where the size is another than the model's.
            seen = tower(images, interpolate_pos_encoding=True, output_hidden_states=True)
        projected: Tensor = self.llava.get_submodule("model.multi_modal_projector")(
            seen.hidden_states[FEATURE_LAYER][:, 1:]  # without the class token
        )
        return projected

    def _embed(self, batch: Batch, is_reduced: bool) -> Embedded:
        ids = batch["input_ids"]
        tokens = self.encode_images(batch["pixels"])
        num_tokens = tokens.shape[1]
        start = find_vision_tokens(ids, num_tokens)
        if is_reduced and self.merge_keep < 1:
            tokens = merge_tokens(tokens, num_merged(num_tokens, self.merge_keep))
        embeddings = self.llava.get_submodule("model.language_model.embed_tokens")(ids)
        return Embedded(
            replace_vision_tokens_in_embeddings_batch(embeddings, tokens, start, num_tokens),
            batch["attention_mask"],
            batch["labels"],
            start,
            tokens.shape[1],
            ids.shape[1] - start - num_tokens,
        )

    def _decode(self, embedded: Embedded, is_reduced: bool) -> Answers:
        decoder: Any = self.llava.get_submodule("model.language_model")
        num_text = embedded.num_text_tokens
        targets = embedded.labels[:, -num_text:]
        is_question = (embedded.attention_mask[:, -num_text:] != 0) & (targets == IGNORED)
        pruning = LayerPruning(embedded.start, embedded.num_vision_tokens, is_question, self.prune_keep)
        layers = self.prune_layers if is_reduced else ()
        with pruning.hooked(decoder.layers, layers):
            hidden = decoder(
                inputs_embeds=embedded.embeddings,
                # Padding is at the end, where no token looks: attention is causal and nothing else.
                attention_mask=torch.ones(
                    embedded.embeddings.shape[:2], dtype=torch.long, device=embedded.embeddings.device
                ),
                use_cache=False,
            ).last_hidden_state
        features = hidden[:, -num_text - 1 : -1]
        logits = self.llava.get_submodule("lm_head")(features)
        return Answers(logits, features, targets, pruning.num_vision_tokens)


def native_size(name: str) -> int:
    """The side of the images that a model's tower has positions for, in pixels."""
    return ARCHITECTURES[name][0]["image_size"]


def num_layers(name: str) -> int:
    """How many layers a model's decoder has."""
    return ARCHITECTURES[name][1][2]


def build_model(
    name: str,
    *,
    is_frozen: bool = False,
    backbone_dtype: torch.dtype = torch.float32,
    lora_rank: int = 0,
    **ways: Any,
) -> VisionLanguageModel:
    """Build one of the ARCHITECTURES with random weights; under `torch.device("meta")` without any.

    With `is_frozen` all but the projector, and the adapters of `lora_rank`, is frozen, in `backbone_dtype`.
    `ways` are what VisionLanguageModel takes.
    """
    with where_to_build(name):
        llava = build_llava(name, backbone_dtype)
        if is_frozen:
            llava.requires_grad_(False)
            llava.get_submodule("model.multi_modal_projector").float().requires_grad_(True)
        if lora_rank:
            add_adapters(llava.get_submodule("model.language_model"), lora_rank)
        return VisionLanguageModel(llava, is_frozen=is_frozen, **ways)


def where_to_build(name: str) -> Any:
    """A host takes minutes to draw seven billion numbers, a GPU a second."""
    is_large = name != "tiny" and torch.get_default_device().type == "cpu" and torch.cuda.is_available()
    return torch.device("cuda") if is_large else nullcontext()


def build_llava(name: str, dtype: torch.dtype) -> nn.Module:
    """transformers' LLaVA of one of the ARCHITECTURES; raises BadInputError where that is not installed."""
    try:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    except ImportError:
        raise BadInputError(
            "the model needs transformers, which is not installed; pip install 'tune-easytrain[lm]'"
        ) from None
    tower, (width, inner, layers, heads, key_heads, vocabulary) = ARCHITECTURES[name]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(patch_size=PATCH, **tower),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=FEATURE_LAYER,
    )
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        llava: nn.Module = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return llava


def add_adapters(decoder: nn.Module, rank: int) -> None:
    """Give the attention's queries and values adapters of a low rank (Hu et al. 2021, arXiv:2106.09685).

    Raises BadInputError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise BadInputError(
            "model.lora_rank needs peft, which is not installed; pip install 'tune-easytrain[lm]', or set "
            "model.lora_rank: 0"
        ) from None
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(adapters, decoder)
    for name, parameter in decoder.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def check_sizes(sizes: Tensor) -> None:
    """Raise VisionTokensError unless all images are of one size; `sizes` is (m, 2), height and width."""
    found = [tuple(size) for size in sizes.tolist()]
    for number, size in enumerate(found):
        if size != found[0]:
            raise VisionTokensError(
                f"the images of a true batch are not of one size: sample 0 has {found[0][0]} × {found[0][1]} "
                f"pixels, sample {number} has {size[0]} × {size[1]}; resize all to unified_image_size"
            )


def find_vision_tokens(input_ids: Tensor, num_tokens: int) -> int:
    """Return where the images' tokens begin, the same position in every sample of (m, L).

    Raises VisionTokensError where they are not `num_tokens` in a row, at the same positions in all samples.
    """
    is_image = input_ids == IMAGE
    start = int(is_image[0].int().argmax())
    expected = torch.zeros_like(is_image[0])
    expected[start : start + num_tokens] = True
    if bool((is_image == expected).all()) and input_ids.shape[1] >= start + num_tokens:
        return start
    places = [row.nonzero().flatten().tolist() for row in is_image.cpu()]
    if all(len(place) == num_tokens for place in places):
        number = next((n for n, place in enumerate(places) if place != places[0]), 0)
        raise VisionTokensError(
            f"vision token positions not aligned across the batch: sample 0 has them at {_span(places[0])}, "
            f"sample {number} at {_span(places[number])}; pad on the right, with the image before what "
            "differs in length"
        )
    number = next(n for n, place in enumerate(places) if len(place) != num_tokens)
    raise VisionTokensError(
        f"sample {number} has {len(places[number])} vision tokens in its text, at {_span(places[number])}, "
        f"and its image is {num_tokens}; resize all images to unified_image_size before the text is made"
    )


def _span(positions: Sequence[int]) -> str:
    return f"{positions[0]}…{positions[-1]}" if positions else "no position"


def replace_vision_tokens_in_embeddings_batch(
    embeddings: Tensor, tokens: Tensor, start: int, num_tokens: int
) -> Tensor:
    """Put vision tokens (m, k, width) where (m, L, width) has `num_tokens` placeholders, from `start` on.

    With k = `num_tokens` this is what LLaVA's masked scatter does; with fewer the result is shorter.
    """
    after = embeddings[:, start + num_tokens :]
    return torch.cat([embeddings[:, :start], tokens.to(embeddings.dtype), after], dim=1)


def num_merged(num_tokens: int, keep: float) -> int:
    """How many of an image's tokens are left after merging: at least half of them."""
    return max(num_tokens - num_tokens // 2, round(num_tokens * keep))


def num_pruned(num_tokens: int, keep: float) -> int:
    """How many of an image's tokens a layer that prunes goes on with."""
    return max(1, round(num_tokens * keep))


def merge_tokens(tokens: Tensor, num_left: int) -> Tensor:
    """Merge the most alike of (m, n, width) until `num_left` are left; the others keep their order.

    Every second token may be merged into the one of the others that it is most like, as the mean of all that
    are merged into it. Source: Bolya et al. 2023, arXiv:2210.09461, with one step for all.
    """
    if tokens.shape[1] == num_left:
        return tokens
    unit = F.normalize(tokens.detach(), dim=-1)
    likeness, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    num_gone = tokens.shape[1] - num_left
    order = likeness.argsort(dim=1, descending=True)
    gone, stay = order[:, :num_gone], order[:, num_gone:].sort(dim=1).values
    into = partner.gather(1, gone)
    kept, others = tokens[:, 1::2], tokens[:, ::2]
    merged = kept.scatter_reduce(1, _wide(into, kept), _take(others, gone), "mean", include_self=True)
    places = torch.arange(kept.shape[1], device=tokens.device).expand(len(tokens), -1)
    order = torch.cat([2 * stay, 2 * places + 1], dim=1).argsort(dim=1)
    return _take(torch.cat([_take(others, stay), merged], dim=1), order)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[-1])


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Return (m, k, width): of each sample of (m, n, width) the tokens at (m, k)."""
    return tokens.gather(1, _wide(index, tokens))


class LayerPruning:
    """Lets some layers of a decoder go on with a part of the vision tokens, those most like the question.

    Every sample of a batch keeps equally many, so that it stays one. The text, its order, and the positions
    that tokens had at the start stay what they are.

    Attributes:
        num_vision_tokens: how many are left so far.
    """

    def __init__(self, start: int, num_vision_tokens: int, is_question: Tensor, keep: float) -> None:
        """`is_question` (m, T) says which of the T tokens after the image are the question's."""
        self.num_vision_tokens = num_vision_tokens
        self._start, self._is_question, self._keep = start, is_question, keep
        self._positions: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def hooked(self, layers: Sequence[nn.Module], at: Sequence[int]) -> Iterator[None]:
        """Prune at the layers of these numbers while inside; no hook is left, whatever happens in there."""
        handles = []
        try:
            for number in range(min(at, default=len(layers)), len(layers)):
                hook = partial(self._before_layer, number in at)
                handles.append(layers[number].register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_layer(self, is_pruning: bool, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, *rest = args
        if is_pruning:
            kept = self._choose(hidden)
            cosine, sine = self._positions or kwargs["position_embeddings"]
            self._positions = tuple(_take(p.expand(len(hidden), -1, -1), kept) for p in (cosine, sine))
            hidden = _take(hidden, kept)
        return (hidden, *rest), {**kwargs, "position_embeddings": self._positions}

    @torch.no_grad()
    def _choose(self, hidden: Tensor) -> Tensor:
        """Return the positions (m, L') to go on with, in order."""
        m, length = hidden.shape[:2]
        end = self._start + self.num_vision_tokens
        weights = self._is_question[..., None].to(hidden.dtype)
        question = (hidden[:, end:] * weights).sum(1) / weights.sum(1).clamp(min=1)
        likeness = F.cosine_similarity(hidden[:, self._start : end], question[:, None], dim=-1)
        self.num_vision_tokens = num_pruned(self.num_vision_tokens, self._keep)
        chosen = self._start + likeness.topk(self.num_vision_tokens, dim=1).indices.sort(dim=1).values
        before, after = torch.arange(self._start), torch.arange(end, length)
        return torch.cat(
            [before.to(hidden.device).expand(m, -1), chosen, after.to(hidden.device).expand(m, -1)], dim=1
        )


def cross_entropy(answers: Sequence[Answers]) -> Tensor:
    """Mean over the answers' tokens."""
    logits = joined([each.logits.flatten(0, 1) for each in answers])
    targets = joined([each.targets.flatten() for each in answers])
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise, targets, ignore_index=IGNORED)


def joined(tensors: list[Tensor]) -> Tensor:
    """All tensors in one; one alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
