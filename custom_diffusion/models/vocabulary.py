"""New words in tokenizers and text encoders: the one place that adds them, finds them, and takes them out again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from custom_diffusion.errors import UserError

# On a text encoder that words were added to: the number of the end that its configuration gave, and how many words its
# tokenizer had before.
_FORMER_END = "_end_before_words"

# --- what a tokenizer makes of words -------------------------------------------------------------


def fold(word: str, tokenizer: Any) -> str:
    """The form in which a tokenizer looks a word up: CLIP's folds case, for one."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return word.lower() if normalizer is None else normalizer.normalize_str(word)


def check_new_words(words: Iterable[str], tokenizer: Any, whose: str = "") -> None:
    """Make sure that a tokenizer knows none of the words yet, and tells them apart.

    A word that is added matches wherever its folded form stands, inside other words too: ``Cat`` would take the place
    of every ``cat``, and of the first letters of "category".

    Args:
        whose: whose words they are, for the message, such as ``" of 'cat-model'"``.

    Raises:
        UserError: for one whose folded form is in the vocabulary, as a word or as a part of words, or is that of
            another new word.
    """
    vocabulary = tokenizer.get_vocab()
    known = {fold(word, tokenizer): word for word in tokenizer.get_added_vocab()}
    for word in words:
        folded = fold(word, tokenizer)
        if not {word, folded, f"{word}</w>", f"{folded}</w>"}.isdisjoint(vocabulary):
            form = "" if folded == word else f", as {folded!r}"
            raise UserError(
                f"the modifier token {word!r}{whose} is in the tokenizer's vocabulary already{form}; "
                "take another, such as '<new1>'"
            )
        if folded in known:
            raise UserError(
                f"the modifier tokens {known[folded]!r} and {word!r}{whose} are the same word to the tokenizer, which "
                f"reads both as {folded!r}; take another, such as '<new2>'"
            )
        known[folded] = word


def names_word(text: str, word: str, tokenizer: Any, cut: bool = False) -> bool:
    """Whether a text names a word that was added to the tokenizer: by the word's id, however it is written.

    Args:
        cut: look only at what the text encoder reads, the first ``model_max_length`` tokens.
    """
    number = tokenizer.get_added_vocab().get(word)
    limit = {"truncation": True, "max_length": tokenizer.model_max_length} if cut else {}
    return number is not None and number in tokenizer(text, verbose=False, **limit).input_ids


def cut_off(text: str, tokenizer: Any) -> str:
    """The end of a text that the text encoder does not read, because it is too long; empty where it reads all."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    return text[encoded.offset_mapping[room][0] :].strip() if len(encoded.input_ids) > room else ""


def limit_length(tokenizer: Any, text_config: Any) -> Any:
    """Let a tokenizer cut texts at the length that the text encoder reads, where its own files say nothing or more."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    return tokenizer


def pool_at_the_end(text_encoder: Any, tokenizer: Any) -> bool:
    """Let the features that sum up a text, which Stable Diffusion XL's UNet is told, be those at its end.

    Older configurations, XL's among them, give 2 as the number of the end. transformers then takes the entry with the
    highest number for it: a word that was added, so that nothing behind the first of these words would count.

    Returns:
        Whether the text encoder was changed.
    """
    if text_encoder.config.eos_token_id != 2:
        return False
    set_end(text_encoder, tokenizer.eos_token_id)
    return True


def set_end(text_encoder: Any, number: int) -> None:
    """Say which entry ends a text; see :func:`pool_at_the_end`."""
    text_encoder.config.eos_token_id = number
    for module in text_encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = number


# --- adding --------------------------------------------------------------------------------------


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


def why_words_cannot_change(text_encoder: Any) -> str | None:
    """Why words cannot be added to a text encoder and taken out now; None where they can."""
    embeddings = text_encoder.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        return f"its embeddings are wrapped in a {type(embeddings).__name__}"
    if embeddings.weight.is_meta:
        return (
            "its weights are offloaded, not in memory; apply and remove concepts before "
            "enable_sequential_cpu_offload(), or after remove_all_hooks()"
        )
    hooks = (getattr(module, "_diffusers_hook", None) for module in text_encoder.modules())
    if any("group_offloading" in registry.hooks for registry in hooks if registry is not None):
        return "its weights are offloaded in groups; apply and remove concepts before that"
    return None


# --- adding what will be taken out ---------------------------------------------------------------


@dataclass(frozen=True)
class AddedWords:
    """Words inside a tokenizer and a text encoder; :meth:`remove` takes them out again, exactly.

    Attributes:
        words: those that were added.
        tokenizer, text_encoder: that they are in. Both are changed in place: pipelines that share one share the other.
        first: how many words the tokenizer had before.
        rows: how many rows the text encoder's table had before.
        covered_rows: what stood in the words' rows, as far as the table had them.
    """

    words: tuple[str, ...]
    tokenizer: Any
    text_encoder: Any
    first: int
    rows: int
    covered_rows: Tensor

    @torch.no_grad()
    def remove(self) -> None:
        """Take the words out; those that others have added since stay, and so do their embeddings."""
        added = self.tokenizer.get_added_vocab()
        ids = sorted(added[word] for word in self.words if word in added)
        if not ids:
            self._give_back_the_end()
            return
        end = len(self.tokenizer)
        _remove_from_tokenizer(self.tokenizer, self.words)
        table, count = embedding_table(self.text_encoder), len(self.tokenizer)
        later = [row for row in range(ids[0], end) if row not in ids]
        table[ids[0] : count] = table[later]
        # Some tables have more rows than there are words: then the table keeps its length, and its spare rows.
        has_spare_rows = self.rows > self.first and count >= self.first and len(table) == max(self.rows, end)
        rows = max(self.rows, count) if has_spare_rows else len(table) - len(ids)
        if rows != len(table):
            self.text_encoder.resize_token_embeddings(rows, mean_resizing=False)
        if has_spare_rows:
            covered = self.covered_rows[count - self.first :]
            embedding_table(self.text_encoder)[count : count + len(covered)] = covered
        self._give_back_the_end()

    def _give_back_the_end(self) -> None:
        """Undo :func:`pool_at_the_end`, when the last word is out that was added since."""
        end, words = getattr(self.text_encoder, _FORMER_END, (None, 0))
        if end is not None and len(self.tokenizer) <= words:
            set_end(self.text_encoder, end)
            delattr(self.text_encoder, _FORMER_END)


def put_words(tokenizer: Any, text_encoder: Any, vectors: Mapping[str, Tensor]) -> AddedWords:
    """Put words into a tokenizer and a text encoder.

    Args:
        vectors: word to embedding, (text width,).
    """
    table, first = embedding_table(text_encoder), len(tokenizer)
    covered_rows = table[first : first + len(vectors)].detach().clone()
    added = AddedWords(tuple(vectors), tokenizer, text_encoder, first, len(table), covered_rows)
    former_end = text_encoder.config.eos_token_id
    if pool_at_the_end(text_encoder, tokenizer):
        setattr(text_encoder, _FORMER_END, (former_end, first))
    add_words(tokenizer, added.words)
    add_embeddings(text_encoder, tokenizer, vectors)
    return added


def _remove_from_tokenizer(tokenizer: Any, words: Sequence[str]) -> None:
    """Take added words out of a tokenizer; those behind them move up."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    removed = [entry["id"] for entry in content["added_tokens"] if entry["content"] in words]
    content["added_tokens"] = [
        entry | {"id": entry["id"] - sum(number < entry["id"] for number in removed)}
        for entry in content["added_tokens"]
        if entry["content"] not in words
    ]
    # No tokenizer forgets a word by itself; diffusers' unload_textual_inversion does the same.
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
