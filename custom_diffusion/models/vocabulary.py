"""New words in tokenizers and text encoders: the one place that adds them, and takes them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from custom_diffusion.errors import UserError


def folded(text: str, tokenizer: Any) -> str:
    """A text as the tokenizer compares it: CLIP's knows no capital letters, and one form of every accent."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return text.lower() if normalizer is None else normalizer.normalize_str(text)


def check_new_words(words: Iterable[str], tokenizer: Any, whose: str = "") -> None:
    """Make sure that a tokenizer knows none of the words yet, and tells them apart.

    Args:
        whose: whose words they are, for the message, such as ``" of 'cat-model'"``.

    Raises:
        UserError: for one whose folded form is in its vocabulary, or is another's.
    """
    vocabulary = tokenizer.get_vocab().keys() | {folded(word, tokenizer) for word in tokenizer.get_added_vocab()}
    known: dict[str, str] = {}
    for word in words:
        form = folded(word, tokenizer)
        if form in vocabulary or f"{form}</w>" in vocabulary:
            raise UserError(
                f"the modifier token {word!r}{whose} is in the tokenizer's vocabulary already"
                f"{'' if form == word else f', as {form!r}'}; take another, such as '<new1>'"
            )
        if form in known:
            raise UserError(
                f"the modifier tokens {known[form]!r} and {word!r}{whose} are the same word to the tokenizer, which "
                "ignores capital letters: take names that differ in more than that"
            )
        known[form] = word


def add_words(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Add words to a tokenizer; gives their ids, which lie behind the whole vocabulary."""
    tokenizer.add_tokens(list(words))
    return tokenizer.convert_tokens_to_ids(list(words))


@torch.no_grad()
def add_embeddings(text_encoder: Any, tokenizer: Any, vectors: Mapping[str, Tensor]) -> None:
    """Give a text encoder the embeddings of words that its tokenizer knows; its table grows where it is too short.

    Args:
        vectors: word to embedding, (text width,).
    """
    if len(tokenizer) > len(embedding_table(text_encoder)):
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = embedding_table(text_encoder)
    for word, vector in vectors.items():
        table[tokenizer.convert_tokens_to_ids(word)] = vector.to(table.device, table.dtype)


def embedding_table(text_encoder: Any) -> Tensor:
    """The embeddings of a text encoder's vocabulary, (vocabulary size, text width)."""
    table = text_encoder.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table


@dataclass(frozen=True)
class AddedWords:
    """Words inside a tokenizer and a text encoder; :meth:`remove` takes them out again, exactly.

    Attributes:
        tokenizer: a copy of the original with the words, because others may share the original.
        original: the tokenizer without them.
        text_encoder: the text encoder that has their embeddings.
        rows: how many rows its table had before.
        covered_rows: what stood in the words' rows, as far as the table had them.
    """

    tokenizer: Any
    original: Any
    text_encoder: Any
    rows: int
    covered_rows: Tensor

    @torch.no_grad()
    def remove(self) -> None:
        """Give the text encoder's table its original rows."""
        first = len(self.original)
        embedding_table(self.text_encoder)[first : first + len(self.covered_rows)] = self.covered_rows
        self.text_encoder.resize_token_embeddings(self.rows, mean_resizing=False)


def put_words(tokenizer: Any, text_encoder: Any, vectors: Mapping[str, Tensor]) -> AddedWords:
    """Put words into a copy of a tokenizer and into a text encoder.

    Args:
        vectors: word to embedding, (text width,).
    """
    table = embedding_table(text_encoder)
    rows, covered_rows = len(table), table[len(tokenizer) :][: len(vectors)].detach().clone()
    with_words = copy.deepcopy(tokenizer)
    add_words(with_words, list(vectors))
    add_embeddings(text_encoder, with_words, vectors)
    return AddedWords(with_words, tokenizer, text_encoder, rows, covered_rows)
