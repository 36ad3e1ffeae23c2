"""The base model's text encoder: a small CLIP text model that learns what captions name, then stays frozen.

Trained together with the UNet from scratch, nouns were ignored: the UNet learns colours long before it can draw. Here
the end token's features must tell everything that a caption names, and which unknown word stands before the noun:
CLIP's tell that too, and a modifier token has to be told from others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from base import world
from base.progress import Training, device
from base.tokenizer import RARE_ENTRIES, clip_merges, merges_for, write_tokenizer

BATCH_SIZE = 128
# Enough for two modifier tokens, a size and a background; a third of the cross-attention that 77 would cost.
MAX_LENGTH = 32
# Some words of README's prompts that the world does not know, so that they are not spelled out in letters.
OTHER_WORDS = ("bucket", "sitting", "wearing", "wooden", "pot", "swimming", "pool", "garden", "chair", "flower")


def new_text_encoder(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer, written into `folder` in Stable Diffusion's files, and a text model of 2 M parameters."""
    merges = merges_for([*world.words_of_the_world(), *OTHER_WORDS], clip_merges(), most_frequent=2500)
    write_tokenizer(folder, merges, RARE_ENTRIES, MAX_LENGTH)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return tokenizer, CLIPTextModel(config)


@dataclass(frozen=True)
class SplitCaption:
    """Token ids of a caption before and after the place where a modifier token would be."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: CLIPTokenizer, example: world.Example) -> Self:
        """Split and tokenise once: a caption is drawn many times."""
        parts = example.caption[: example.slot], example.caption[example.slot :]
        return cls(*(tokenizer(part, add_special_tokens=False).input_ids for part in parts))

    def ids(self, vocabulary: int, filler: int | None = None) -> list[int]:
        """MAX_LENGTH ids, with the token `filler` in the place; the last two of the `vocabulary` are start and end."""
        words = [*self.before, *([] if filler is None else [filler]), *self.after]
        ids = [vocabulary - 2, *words][: MAX_LENGTH - 1]
        return [*ids, *[vocabulary - 1] * (MAX_LENGTH - len(ids))]


class Attributes(torch.nn.Module):
    """The text model with the two readings of its end token that it is trained by."""

    def __init__(self, text_encoder: CLIPTextModel, attributes: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.named = torch.nn.Linear(width, attributes)
        self.filler, self.entry = torch.nn.Linear(width, 64), torch.nn.Linear(width, 64)

    def forward(
        self, ids: torch.Tensor, named: torch.Tensor, fillers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of ids (n, length), named (n, attributes) of 0 and 1, fillers (n,) of ids or -1; share all right."""
        pooled = self.text_encoder(ids).pooler_output
        guessed = self.named(pooled)
        # Summed over attributes: nearly all of them are absent from any one caption.
        attributes = functional.binary_cross_entropy_with_logits(guessed, named, reduction="none").sum(1).mean()
        right = ((guessed > 0) == (named > 0)).all(1).float().mean()
        filled = fillers >= 0
        entries = self.text_encoder.get_input_embeddings()(fillers[filled])
        read = functional.normalize(self.filler(pooled[filled]), dim=1)
        agreement = 10 * read @ functional.normalize(self.entry(entries), dim=1).T
        same = fillers[filled][:, None] == fillers[filled][None]
        word = functional.cross_entropy(agreement, same.float() / same.sum(1, keepdim=True))
        return attributes, word, right


def train(icons: dict[str, np.ndarray], folder: Path, steps: int, pool: int = 30_000) -> None:
    """Train for `steps` batches of captions; `folder/tokenizer` and `folder/trained` get the result."""
    on = device()
    torch.manual_seed(0)
    tokenizer, text_encoder = new_text_encoder(folder / "tokenizer")
    examples = world.examples(icons, pool, wide=0.8, seed=3)
    captions = [SplitCaption.of(tokenizer, example) for example in examples]
    vocabulary = {name: i for i, name in enumerate(sorted({a for e in examples for a in e.attributes}))}
    objective = Attributes(text_encoder, len(vocabulary)).to(on)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    training = Training(folder, objective, optimizer, steps)
    for step in training:
        generator = np.random.default_rng((4, step))
        ids, fillers = [], []
        named = torch.zeros(BATCH_SIZE, len(vocabulary))
        for row, index in enumerate(generator.integers(0, len(captions), BATCH_SIZE)):
            # Any entry but the two special ones, which come last.
            filler = int(generator.integers(0, len(tokenizer) - 2)) if generator.random() < 0.5 else None
            fillers.append(-1 if filler is None else filler)
            ids.append(captions[index].ids(len(tokenizer), filler))
            named[row, [vocabulary[name] for name in examples[index].attributes]] = 1
        # Nothing after the end token can change its features: the longest caption decides the length.
        longest = max(row.index(tokenizer.eos_token_id) for row in ids) + 1
        batch = torch.tensor(ids, device=on)[:, :longest], named.to(on), torch.tensor(fillers, device=on)
        attributes, word, right = objective(*batch)
        losses = {"attributes": attributes, "unknown_word": word, "all_right": right}
        training.update(attributes + 0.3 * word, peak=1e-3, losses=losses)
    text_encoder.eval().save_pretrained(folder / "trained")
