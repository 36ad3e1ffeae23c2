"""The new words: their entries in the tokenizer, and the embeddings that are trained."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from custom_diffusion.concept.files import check_token_name
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError

logger = logging.getLogger("custom_diffusion")


@dataclass(frozen=True)
class ModifierTokens:
    """The new words and where they start from.

    Attributes:
        tokens: such as ``["<new1>", "<new2>"]``; empty where only the attention is trained.
        ids: their ids in the tokenizer, consecutive and behind the whole vocabulary.
        initializer_ids: the vocabulary entries whose embeddings they start from.
    """

    tokens: list[str]
    ids: list[int]
    initializer_ids: list[int]


def parse_modifier_tokens(args: argparse.Namespace, concepts: Sequence[ConceptEntry]) -> tuple[list[str], list[str]]:
    """Modifier and initializer tokens of the command line, checked as far as that goes without a tokenizer.

    Raises:
        UserError: for names that cannot be used, too few initializers, or a token that no prompt has.
    """
    if args.modifier_token is None:
        return [], []
    tokens, initializers = args.modifier_token.split("+"), args.initializer_token.split("+")
    for token in tokens:
        check_token_name(token)
        if tokens.count(token) > 1:
            raise UserError(f"--modifier_token has {token!r} twice")
        if not any(token in concept.instance_prompt for concept in concepts):
            prompts = ", ".join(repr(concept.instance_prompt) for concept in concepts)
            raise UserError(
                f"the modifier token {token!r} is in no instance prompt ({prompts}), so it would learn nothing"
            )
    if len(initializers) < len(tokens):
        raise UserError(
            f"--initializer_token has {len(initializers)} entries for {len(tokens)} modifier tokens: "
            "give one for each, joined with '+'"
        )
    for concept in concepts:
        if not any(token in concept.instance_prompt for token in tokens):
            logger.warning(f"the instance prompt {concept.instance_prompt!r} has none of the modifier tokens")
    return tokens, initializers[: len(tokens)]


def add_modifier_tokens(tokenizer: CLIPTokenizer, tokens: Sequence[str], initializers: Sequence[str]) -> ModifierTokens:
    """Add the new words to the tokenizer, and find where each starts from.

    An initializer is looked up as a vocabulary entry first: the default ``ktn`` is an entry that occurs only inside
    words (the rarest make the most neutral start), and as a word of its own it would be two tokens.

    Raises:
        UserError: for a token that is in the vocabulary, or an initializer of several tokens.
    """
    vocabulary = tokenizer.get_vocab()
    initializer_ids = []
    for token, initializer in zip(tokens, initializers, strict=True):
        if token in vocabulary or f"{token}</w>" in vocabulary:
            raise UserError(
                f"the modifier token {token!r} is in the tokenizer's vocabulary already; take another, such as '<new1>'"
            )
        ids = (
            [vocabulary[initializer]]
            if initializer in vocabulary
            else tokenizer(initializer, add_special_tokens=False).input_ids
        )
        if len(ids) != 1:
            raise UserError(
                f"the initializer {initializer!r} of {token!r} is {len(ids)} tokens and must be one; take a common word"
            )
        initializer_ids += ids
        logger.info(f"{token} starts from vocabulary entry {ids[0]}, {tokenizer.convert_ids_to_tokens(ids[0])!r}")
    tokenizer.add_tokens(list(tokens))
    return ModifierTokens(list(tokens), tokenizer.convert_tokens_to_ids(list(tokens)), initializer_ids)


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
