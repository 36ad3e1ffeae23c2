"""What the text encoders of a base model make of prompts with and without a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_diffusion.concept.applying import check_tokens
from custom_diffusion.concept.gating import TokenGate
from custom_diffusion.concept.parts import Part
from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.families import Family
from custom_diffusion.models.vocabulary import add_embeddings, add_words

CAPTIONS = Path(__file__).with_name("regularization.txt")

_BATCH = 64


def read_captions(path: Path, count: int | None = None, flag: str = "--captions") -> list[str]:
    """At most ``count`` captions, spread evenly over the file; without a count, all of them.

    Args:
        flag: that names the file, for messages.

    Raises:
        UserError: for a file that cannot be read or is empty.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {str(path)!r} cannot be read: {getattr(error, 'strerror', error)}") from error
    captions = list(dict.fromkeys(line for line in lines if line))
    if not captions:
        raise UserError(f"{flag} {str(path)!r} has no {flag.strip('-').split('_')[0]}")
    count = len(captions) if count is None else min(count, len(captions))
    return [captions[number * len(captions) // count] for number in range(count)]


def check_enough(features: Tensor, num_captions: int) -> None:
    """Make sure that captions say as much as the closed form of merging asks about.

    Args:
        features: those of the captions, (number of tokens, width).

    Raises:
        UserError: for fewer tokens than the features are wide, with how many captions would do.
    """
    count, width = features.shape
    if count < width:
        needed = -(-width * num_captions // count)
        raise UserError(
            f"the {num_captions} captions have {count} words, too few for text features of width {width}: give some "
            f"{needed} with --captions and --num_captions"
        )


@dataclass(frozen=True)
class TextModels:
    """All of a base model that reads text.

    Attributes:
        family: the model's.
        tokenizers, text_encoders: by the names of the text encoders.
    """

    family: Family
    tokenizers: Mapping[str, Any]
    text_encoders: Mapping[str, Any]

    @classmethod
    def load(cls, base_model: BaseModel) -> TextModels:
        """Read them from a base model."""
        family = base_model.family()
        return cls(family, base_model.tokenizers(family), base_model.text_encoders(family))

    def add_tokens(self, parts: Sequence[Part]) -> None:
        """Put the tokens of all parts into tokenizers and text encoders.

        Raises:
            UserError: for a token that a vocabulary has already, or of another width.
        """
        tokens = {token: (own, part.concept) for part in parts for token, own in part.concept.tokens.items()}
        check_tokens(tokens, self.family, self.tokenizers, self.text_encoders)
        for name, tokenizer in self.tokenizers.items():
            add_words(tokenizer, list(tokens))
            vectors = {token: own[name] for token, (own, _) in tokens.items()}
            add_embeddings(self.text_encoders[name], tokenizer, vectors)

    @torch.no_grad()
    def features(self, prompts: Sequence[str], leave_out: str = "") -> Tensor:
        """Features of every token of the prompts up to the first end-of-text, without the start token.

        Args:
            prompts: texts; longer ones than the encoders' 77 tokens are cut.
            leave_out: words at the start of every prompt whose features are not wanted.

        Returns:
            (number of tokens of all prompts, width), float32.
        """
        first = next(iter(self.tokenizers.values()))
        skip = 1 + len(first(leave_out, add_special_tokens=False).input_ids)
        ids = [
            {
                name: tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
                for name, tokenizer in self.tokenizers.items()
            }
            for prompt in prompts
        ]
        # The encoders are causal: what is behind a token does not change it, so no padding is needed, only equal
        # lengths; and these are the same for all of a family's tokenizers, whose features stand side by side.
        lengths = [len(next(iter(one.values()))) for one in ids]
        features: list[Tensor] = []
        for length in sorted(set(lengths)):
            rows = [one for one, own in zip(ids, lengths, strict=True) if own == length]
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                inputs = {name: torch.tensor([row[name] for row in batch]) for name in self.tokenizers}
                encoded = self.family.encode(self.text_encoders, inputs)["features"]
                features.append(encoded[:, skip:].flatten(0, 1))
        return torch.cat(features)

    def mean_square(self, prompts: Sequence[str]) -> Tensor:
        """``F^T F / n`` of the features F of n prompts at all positions, as a UNet sees them: (width, width), float64.

        Start and padding are the same in every prompt, and so weigh most: what is changed there is changed for all.
        """
        return self.mean_squares(prompts)[0]

    @torch.no_grad()
    def mean_squares(self, prompts: Sequence[str], gate: TokenGate | None = None) -> Tensor:
        """:meth:`mean_square`, and behind it the same sum over the words of each concept of a gate alone.

        Returns:
            (1 + number of concepts, width, width), float64.
        """
        total: Tensor | float = 0.0
        for start in range(0, len(prompts), _BATCH):
            ids = self.tokenize(prompts[start : start + _BATCH])
            features = self.family.encode(self.text_encoders, ids)["features"].double()
            everywhere = features.flatten(0, 1)
            squares = [everywhere.T @ everywhere]
            masks = () if gate is None else gate.mask(next(iter(ids.values()))).unbind(-1)
            squares += [features[mask].T @ features[mask] for mask in masks]
            total = total + torch.stack(squares)
        assert isinstance(total, Tensor), "no prompts"
        return total / len(prompts)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts to ids, padded or cut to what the text encoders read, (number of prompts, 77), by their names."""
        ids = [self.family.tokenize(self.tokenizers, prompt) for prompt in prompts]
        return {name: torch.stack([one[name] for one in ids]) for name in self.tokenizers}

    def target_features(self, parts: Sequence[Part]) -> list[Tensor]:
        """Per part the features of its words, alone and behind "photo of a", each (tokens, width)."""
        features = []
        for part in parts:
            phrases = part.phrases()
            alone = self.features(phrases)
            lead = "photo of a"
            in_prompt = self.features([f"{lead} {phrase}" for phrase in phrases], lead)
            features.append(torch.cat([alone, in_prompt]))
        return features
