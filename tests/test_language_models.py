from __future__ import annotations

import pytest

from tune_easytrain.errors import BadInputError
from tune_easytrain.language_models import LANGUAGE_MODELS, find_language_model


def test_sizes_are_those_that_people_name() -> None:
    assert list(LANGUAGE_MODELS) == ["1b", "3b", "7b", "13b", "30b", "70b"]
    assert find_language_model("7B") is find_language_model("7b")


@pytest.mark.parametrize("size", ["8b", "7", "", "llama"])
def test_an_unknown_size_is_told_with_all_there_are(size: str) -> None:
    with pytest.raises(
        BadInputError, match=rf"--model: unknown size '{size}'; valid: 1b, 3b, 7b, 13b, 30b, 70b"
    ):
        find_language_model(size)


def test_the_cache_of_keys_and_values_counts_the_heads_that_have_them() -> None:
    # Llama 2 7B: 0.5 MiB a token in 16 bits. Of the 70B's 64 heads 8 have keys and values: 0.3125 MiB.
    assert find_language_model("7b").key_value_cache_bytes(1, 2) == 2**19
    assert find_language_model("70b").key_value_cache_bytes(4096, 2) == 4096 * 5 * 2**16
