"""The new words: their entries in the tokenizer, and the embeddings that are trained."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from custom_diffusion.concept.files import check_token_name
from custom_diffusion.errors import UserError
from custom_diffusion.models.vocabulary import add_words, check_new_words, pool_at_the_end

logger = logging.getLogger("custom_diffusion")


@dataclass(frozen=True)
class ModifierTokens:
    """The new words and where they start from.

    Attributes:
        tokens: such as ``["<new1>", "<new2>"]``; empty where only the attention is trained.
        ids: per text encoder, their ids in its tokenizer, consecutive and behind the whole vocabulary.
        initializer_ids: per text encoder, the vocabulary entries whose embeddings they start from.
    """

    tokens: list[str]
    ids: dict[str, list[int]]
    initializer_ids: dict[str, list[int]]


def parse_modifier_tokens(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Modifier and initializer tokens of the command line, checked as far as that goes without a tokenizer.

    Raises:
        UserError: for names that cannot be used, or too few initializers.
    """
    if args.modifier_token is None:
        return [], []
    tokens, initializers = args.modifier_token.split("+"), args.initializer_token.split("+")
    for token in tokens:
        check_token_name(token)
        if tokens.count(token) > 1:
            raise UserError(f"--modifier_token has {token!r} twice")
    if len(initializers) < len(tokens):
        raise UserError(
            f"--initializer_token has {len(initializers)} entries for {len(tokens)} modifier tokens: "
            "give one for each, joined with '+'"
        )
    return tokens, initializers[: len(tokens)]


def add_modifier_tokens(
    tokenizers: Mapping[str, CLIPTokenizer], tokens: Sequence[str], initializers: Sequence[str]
) -> ModifierTokens:
    """Add the new words to the tokenizers, and find where each starts from.

    Args:
        tokenizers: by the names of their text encoders.
        tokens, initializers: one initializer for each token.

    Raises:
        UserError: for a token that is in a vocabulary, or an initializer of several tokens.
    """
    ids, initializer_ids = {}, {}
    for name, tokenizer in tokenizers.items():
        check_new_words(tokens, tokenizer)
        initializer_ids[name] = [
            _initializer_id(tokenizer, token, initializer)
            for token, initializer in zip(tokens, initializers, strict=True)
        ]
        ids[name] = add_words(tokenizer, tokens)
    return ModifierTokens(list(tokens), ids, initializer_ids)


def _initializer_id(tokenizer: CLIPTokenizer, token: str, initializer: str) -> int:
    """The vocabulary entry that a token starts from.

    An initializer is looked up as an entry first: the default ``ktn`` is one that occurs only inside words (the rarest
    make the most neutral start), and as a word of its own it would be two tokens.
    """
    vocabulary = tokenizer.get_vocab()
    ids = (
        [vocabulary[initializer]]
        if initializer in vocabulary
        else tokenizer(initializer, add_special_tokens=False).input_ids
    )
    if len(ids) != 1:
        raise UserError(
            f"the initializer {initializer!r} of {token!r} is {len(ids)} tokens and must be one; take a common word"
        )
    logger.info(f"{token} starts from vocabulary entry {ids[0]}, {tokenizer.convert_ids_to_tokens(ids[0])!r}")
    return ids[0]


class ModifierTokenEmbedding(nn.Module):
    """The text encoder's embedding table with trainable rows for the modifier tokens behind it.

    Only the rows are a parameter that trains: the table has no gradient, no optimizer state and no weight decay.

    Args:
        table: the frozen table, (vocabulary size, width).
        first_id: id of the first modifier token; all ids from there on are modifier tokens.
        rows: what they start from, (number of tokens, width), float32.
    """

    def __init__(self, table: nn.Embedding, first_id: int, rows: Tensor) -> None:
        super().__init__()
        # The table is the first submodule because libraries take a model's first parameter for its type.
        self.table = table
        self.rows = nn.Embedding.from_pretrained(rows, freeze=False)
        self.first_id = first_id

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) ids to (batch, length, width) embeddings in the table's type."""
        is_modifier = input_ids >= self.first_id
        known = self.table(input_ids.masked_fill(is_modifier, 0))
        learned = self.rows((input_ids - self.first_id).clamp(min=0)).to(known.dtype)
        return torch.where(is_modifier.unsqueeze(-1), learned, known)


def train_new_words(
    text_encoders: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, CLIPTokenizer],
    modifier_tokens: ModifierTokens,
) -> None:
    """Put trainable rows for the modifier tokens behind the embedding table of every text encoder."""
    if not modifier_tokens.tokens:
        return
    for name, text_encoder in text_encoders.items():
        pool_at_the_end(text_encoder, tokenizers[name])
        table = text_encoder.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        rows = table.weight.detach()[modifier_tokens.initializer_ids[name]].float().clone()
        text_encoder.set_input_embeddings(ModifierTokenEmbedding(table, modifier_tokens.ids[name][0], rows))
