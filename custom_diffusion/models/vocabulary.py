"""New words in tokenizers and text encoders: the one place that adds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from custom_diffusion.errors import UserError


def check_new_words(words: Iterable[str], tokenizer: Any, whose: str = "") -> None:
    """Make sure that a tokenizer knows none of the words yet.

    Args:
        whose: whose words they are, for the message, such as ``" of 'cat-model'"``.

    Raises:
        UserError: for one that is in its vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    for word in words:
        if word in vocabulary or f"{word}</w>" in vocabulary:
            raise UserError(
                f"the modifier token {word!r}{whose} is in the tokenizer's vocabulary already; "
                "take another, such as '<new1>'"
            )


def add_words(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Add words to a tokenizer; gives their ids, which lie behind the whole vocabulary."""
    tokenizer.add_tokens(list(words))
    return tokenizer.convert_tokens_to_ids(list(words))


@torch.no_grad()
def add_embeddings(text_encoder: PreTrainedModel, tokenizer: Any, vectors: Mapping[str, Tensor]) -> None:
    """Give a text encoder the embeddings of words that its tokenizer knows; its table grows where it is too short.

    Args:
        vectors: word to embedding, (text width,).
    """
    if len(tokenizer) > len(_table(text_encoder)):
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = _table(text_encoder)
    for word, vector in vectors.items():
        table[tokenizer.convert_tokens_to_ids(word)] = vector.to(table.device, table.dtype)


def _table(text_encoder: PreTrainedModel) -> Tensor:
    table = text_encoder.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table
