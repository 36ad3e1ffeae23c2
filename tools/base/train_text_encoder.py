"""The base model's text encoder: a small CLIP text model that learns what captions name, then stays frozen.

Trained together with the UNet from scratch, nouns were ignored: the UNet learns colours long before it can draw. Here
a noun's features must tell all that its phrase names, and which unknown word stands before it; those of the caption's
last word all the rest. An unknown word changes its own noun phrase and nothing else, and the end tokens say nothing.
CLIP's end tokens tell everything; read there, a new word was taught to all things in the image, not to its noun.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tools.base import world
from tools.base.progress import Training, device
from tools.base.tokenizer import RARE_ENTRIES, clip_merges, merges_for, write_tokenizer

BATCH_SIZE = 128
# Enough for two modifier tokens, a size and a background; a third of the cross-attention that 77 would cost.
MAX_LENGTH = 32
# Some words of README's prompts that the world does not know, so that they are not spelled out in letters.
OTHER_WORDS = ("bucket", "sitting", "wearing", "wooden", "pot", "swimming", "pool", "garden", "chair", "flower")

# Weight of what an unknown word changes beyond its own noun phrase, as a share of the features' variance.
SPREAD = 10.0


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
class TokenizedCaption:
    """A caption's token ids in pieces, each with the number of the noun phrase that it is, or -1."""

    pieces: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, tokenizer: CLIPTokenizer, example: world.Example) -> Self:
        """Tokenise once: a caption is drawn many times."""
        pieces, end = [], 0
        for number, phrase in enumerate(example.phrases):
            pieces += [(-1, example.caption[end : phrase[0]]), (number, example.caption[slice(*phrase)])]
            end = phrase[1]
        pieces.append((-1, example.caption[end:]))
        return cls(tuple((n, tuple(tokenizer(text, add_special_tokens=False).input_ids)) for n, text in pieces))

    def ids(self, vocabulary: int, unknown: Sequence[int | None] = ()) -> tuple[list[int], list[int], list[int]]:
        """MAX_LENGTH ids with the words `unknown` before their noun phrases, and two lists of positions.

        Of the first list, an entry for each id is the position of the same id without unknown words; -1 for unknown
        words and the phrases that they change. The second has the last position of each noun phrase. The last two
        entries of the `vocabulary` are the start and end tokens.
        """
        ids, unchanged, nouns, position = [vocabulary - 2], [0], [], 1
        for number, words in self.pieces:
            word = unknown[number] if 0 <= number < len(unknown) else None
            known = range(position, position + len(words))
            ids += words if word is None else (word, *words)
            unchanged += known if word is None else [-1] * (1 + len(words))
            position += len(words)
            if number >= 0:
                nouns.append(len(ids) - 1)
        tail = MAX_LENGTH - len(ids)
        return [*ids, *[vocabulary - 1] * tail], [*unchanged, *range(position, position + tail)], nouns


def unknown_words(table: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Embeddings (count, width) of words nobody knows: rows of `table` moved at random by up to twice their size.

    A modifier token starts as a rare word's row, and training moves it by as much as its size.
    """
    rows = table.detach()[torch.randint(len(table) - 2, (count,), generator=generator)]
    noise = torch.randn(rows.shape, generator=generator).to(rows) * table.detach().std()
    return rows + noise * 2 * torch.rand(count, 1, generator=generator).to(rows)


def encoded(text_encoder: CLIPTextModel, ids: torch.Tensor, unknown: torch.Tensor) -> BaseModelOutputWithPooling:
    """The text model's output for ids (n, length), of which those past the vocabulary mean rows of `unknown`."""
    table = text_encoder.get_input_embeddings().weight
    name = next(name for name, value in text_encoder.named_parameters() if value is table)
    return functional_call(text_encoder, {name: torch.cat([table, unknown])}, (ids,))


class Batch(NamedTuple):
    """n captions with and without unknown words, in places as `TokenizedCaption.ids` gives them."""

    plain: torch.Tensor  # ids (n, MAX_LENGTH)
    ids: torch.Tensor  # the same with unknown words: ids from the vocabulary's size on
    unchanged: torch.Tensor  # (n, MAX_LENGTH), positions in `plain`, or -1
    read: torch.Tensor  # (m, 2): row and position of the last word of each noun phrase, and of each caption
    said: torch.Tensor  # (m, attributes): 1 for what is named up to there, 0 for what is not, -1 for other questions
    changed: torch.Tensor  # (k, 3): row and position of a noun with an unknown word, and the number of that


class Attributes(torch.nn.Module):
    """The text model with the readings that it is trained by."""

    def __init__(self, text_encoder: CLIPTextModel, attributes: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.named = torch.nn.Linear(width, attributes)
        self.read, self.word = torch.nn.Linear(width, 64), torch.nn.Linear(width, 64)

    def forward(
        self, batch: Batch, unknown: torch.Tensor, plain: torch.Tensor, nothing: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of a batch with the embeddings `unknown` (any number, width); share of readings all right.

        `plain` (n, MAX_LENGTH, width) are the features without unknown words, `nothing` (1, MAX_LENGTH, width) those
        of no words at all.
        """
        features = encoded(self.text_encoder, batch.ids, unknown).last_hidden_state
        row, position = batch.read.T
        guessed = self.named(features[row, position])
        asked = batch.said >= 0
        wrong = functional.binary_cross_entropy_with_logits(guessed, batch.said.clamp(min=0), reduction="none")
        # Summed over attributes: nearly all of them are absent from any one phrase.
        attributes = (wrong * asked).sum(1).mean()
        right = (((guessed > 0) == (batch.said > 0)) | ~asked).all(1).float().mean()
        row, position, number = batch.changed.T
        words = functional.normalize(self.word(unknown), dim=1)
        agreement = 10 * functional.normalize(self.read(features[row, position]), dim=1) @ words.T
        word = functional.cross_entropy(agreement, number)
        before = plain.gather(1, batch.unchanged.clamp(min=0)[..., None].expand_as(plain))
        ends = batch.ids == self.text_encoder.config.eos_token_id
        spread = (features - torch.where(ends[..., None], nothing, before))[batch.unchanged >= 0].square().mean()
        return attributes, word, spread / plain.var(), right


def draw_batch(
    captions: list[TokenizedCaption], said: list[list[torch.Tensor]], vocabulary: int, generator: np.random.Generator
) -> Batch:
    """BATCH_SIZE of `captions`, most with unknown words, and of what is `said` in each."""
    plain, ids, unchanged, read, named, changed = [], [], [], [], [], []
    for row, index in enumerate(generator.integers(0, len(captions), BATCH_SIZE)):
        unknown = [2 * row + number if generator.random() < 0.6 else None for number in range(2)]
        words = [None if number is None else vocabulary + number for number in unknown]
        row_ids, row_unchanged, nouns = captions[index].ids(vocabulary, words)
        plain.append(captions[index].ids(vocabulary)[0])
        ids.append(row_ids)
        unchanged.append(row_unchanged)
        last = row_ids.index(vocabulary - 1) - 1
        read += [(row, position) for position in (*nouns, last)]
        named += said[index]
        changed += [(row, position, n) for position, n in zip(nouns, unknown, strict=False) if n is not None]
    return Batch(*map(torch.tensor, (plain, ids, unchanged, read)), torch.stack(named), torch.tensor(changed))


def what_is_said(examples: list[world.Example]) -> list[list[torch.Tensor]]:
    """For every example, attributes as in `Batch.said`: those of each noun phrase, then those of the whole caption."""
    things = sorted({a[2:] for e in examples for a in e.attributes if a[0].isdigit()})
    others = sorted({a for e in examples for a in e.attributes if not a[0].isdigit()})

    def answers(example: world.Example) -> list[torch.Tensor]:
        rows = [
            [float(f"{number}:{thing}" in example.attributes) for thing in things] + [-1.0] * len(others)
            for number in range(1, len(example.phrases) + 1)
        ]
        rows.append([-1.0] * len(things) + [float(other in example.attributes) for other in others])
        return [torch.tensor(row) for row in rows]

    return [answers(example) for example in examples]


def train(icons: dict[str, np.ndarray], folder: Path, steps: int, pool: int = 30_000) -> None:
    """Train for `steps` batches of captions; `folder/tokenizer` and `folder/trained` get the result."""
    on = device()
    torch.manual_seed(0)
    tokenizer, text_encoder = new_text_encoder(folder / "tokenizer")
    examples = world.examples(icons, pool, wide=0.8, seed=3)
    captions = [TokenizedCaption.of(tokenizer, example) for example in examples]
    said = what_is_said(examples)
    objective = Attributes(text_encoder, len(said[0][0])).to(on)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    training = Training(folder, objective, optimizer, steps)
    no_words = torch.tensor([TokenizedCaption().ids(len(tokenizer))[0]], device=on)
    for step in training:
        batch = draw_batch(captions, said, len(tokenizer), np.random.default_rng((4, step)))
        batch = Batch(*(part.to(on) for part in batch))
        draw = torch.Generator().manual_seed(step)
        table = text_encoder.get_input_embeddings().weight.detach()
        unknown = unknown_words(table, 2 * BATCH_SIZE, draw).requires_grad_()
        with torch.no_grad():
            plain = text_encoder(batch.plain).last_hidden_state
            nothing = text_encoder(no_words).last_hidden_state
        # Teaching a concept moves its word to where that has most effect, and there random words hardly go: so they
        # are moved, by up to a word's size, in the direction in which they spoil most of what does not belong to them.
        attributes, _, spread, _ = objective(batch, unknown, plain, nothing)
        (worst,) = torch.autograd.grad(attributes + SPREAD * spread, unknown)
        size = table.norm(dim=1).mean() * torch.rand(len(unknown), 1, generator=draw).to(on)
        unknown = (unknown + size * functional.normalize(worst, dim=1)).detach()
        attributes, word, spread, right = objective(batch, unknown, plain, nothing)
        losses = {"attributes": attributes, "unknown_word": word, "spread": spread, "all_right": right}
        training.update(attributes + 0.3 * word + SPREAD * spread, peak=1e-3, losses=losses)
    text_encoder.eval().save_pretrained(folder / "trained")
