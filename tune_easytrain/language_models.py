"""The public shapes of language models by size: what `recommend` builds without weights. No torch here.

All are decoders of the Llama family: Llama 3.2 1B and 3B (Meta 2024, their model cards), Llama 2 7B, 13B and
70B (Touvron et al. 2023, arXiv:2307.09288), and of the first LLaMA the one known as 30B, which has 32.5
billion parameters (Touvron et al. 2023, arXiv:2302.13971).
"""

from __future__ import annotations

from dataclasses import dataclass

from tune_easytrain.errors import BadInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """The shape of one decoder.

    Attributes:
        size: what the command line calls it, such as `7b`.
        published_as: whose published shape it is.
        hidden_size: numbers that stand for a token between blocks.
        intermediate_size: the same inside of a block's feed-forward part.
        num_layers: decoder blocks.
        num_heads: attention heads of queries, of `hidden_size / num_heads` numbers each.
        num_key_value_heads: heads of keys and values, each shared by as many heads of queries.
        vocabulary_size: distinct tokens.
        longest_sequence: the most tokens it was made for.
        ties_embeddings: whether the embedding of tokens is the last layer too.
    """

    size: str
    published_as: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocabulary_size: int
    longest_sequence: int
    ties_embeddings: bool = False

    def key_value_cache_bytes(self, num_tokens: int, bytes_per_number: int) -> int:
        """Return what generation keeps of a sequence's keys and values, in bytes."""
        per_token = 2 * self.num_layers * self.num_key_value_heads * (self.hidden_size // self.num_heads)
        return per_token * num_tokens * bytes_per_number


LANGUAGE_MODELS = {
    model.size: model
    for model in (
        LanguageModel(
            size="1b",
            published_as="Llama 3.2 1B",
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=16,
            num_heads=32,
            num_key_value_heads=8,
            vocabulary_size=128256,
            longest_sequence=131072,
            ties_embeddings=True,
        ),
        LanguageModel(
            size="3b",
            published_as="Llama 3.2 3B",
            hidden_size=3072,
            intermediate_size=8192,
            num_layers=28,
            num_heads=24,
            num_key_value_heads=8,
            vocabulary_size=128256,
            longest_sequence=131072,
            ties_embeddings=True,
        ),
        LanguageModel(
            size="7b",
            published_as="Llama 2 7B",
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_heads=32,
            num_key_value_heads=32,
            vocabulary_size=32000,
            longest_sequence=4096,
        ),
        LanguageModel(
            size="13b",
            published_as="Llama 2 13B",
            hidden_size=5120,
            intermediate_size=13824,
            num_layers=40,
            num_heads=40,
            num_key_value_heads=40,
            vocabulary_size=32000,
            longest_sequence=4096,
        ),
        LanguageModel(
            size="30b",
            published_as="LLaMA 30B",
            hidden_size=6656,
            intermediate_size=17920,
            num_layers=60,
            num_heads=52,
            num_key_value_heads=52,
            vocabulary_size=32000,
            longest_sequence=2048,
        ),
        LanguageModel(
            size="70b",
            published_as="Llama 2 70B",
            hidden_size=8192,
            intermediate_size=28672,
            num_layers=80,
            num_heads=64,
            num_key_value_heads=8,
            vocabulary_size=32000,
            longest_sequence=4096,
        ),
    )
}


def find_language_model(size: str) -> LanguageModel:
    """Return the model of a size such as `7b` or `7B`; raises BadInputError for a size there is none of."""
    try:
        return LANGUAGE_MODELS[size.lower()]
    except KeyError:
        raise BadInputError(f"--model: unknown size {size!r}; valid: {', '.join(LANGUAGE_MODELS)}") from None
