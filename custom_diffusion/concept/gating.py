"""Concepts that act at their own words alone (``--token_gate``): which positions these are, and what acts there.

Keys and values are linear in the text features, so a learned change can act at chosen positions exactly:
``K_i = W0 c_i + sum over concepts m_c(i) dW_c c_i``. The rule for ``m_c(i) = 1``:

- every modifier token of the concept, each time it occurs;
- the class words right behind it, every token of them, in singular or plural ("<new1> wooden pots" for "wooden pot").
  Where the class words are not known, the one word that follows; punctuation, another new word and the end are none.
- Nothing else. What lies behind the text encoder's 77 tokens is not read, and so has no position.

The rule reads token ids, which batches and pipelines have; all text encoders of a family read the same words.
"""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from custom_diffusion.concept.low_rank import LowRank, low_rank_of
from custom_diffusion.errors import UserError
from custom_diffusion.text import one_line

GATE_NAME = "token_gate"  # in the weights file: the words, as the bytes of JSON
END_OF_WORD = "</w>"  # CLIP's mark

_NAME = re.compile(r"(?P<projection>.+\.attn2\.processor\.to_[kv])_gated(?P<low>_low_rank)?\.(?P<rest>.+)\.(?P<n>\d+)")
_OPENING = re.compile(r"(?:(?:an?|the)\s+)?(?:(?:photo|image|picture|painting|drawing)\s+of\s+)?(?:(?:an?|the)\s+)?")


@dataclass(frozen=True)
class GatedWords:
    """The words of a gated concept.

    Attributes:
        tokens: its modifier tokens.
        classes: what may follow them, such as ``wooden pot``; empty where any one word may.
    """

    tokens: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __str__(self) -> str:
        classes = " or ".join(map(repr, self.classes)) or "the word that follows"
        return f"{' and '.join(self.tokens)}, and {classes} right behind"


@dataclass(frozen=True)
class GatedWeights:
    """What acts at the words of one concept, as differences from the base model's keys and values.

    Attributes:
        words: where it acts.
        changes: (out, in) each, keyed like :attr:`Concept.attention`.
        factors: those that are known as a product of low rank, keyed alike.
    """

    words: GatedWords
    changes: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, LowRank] = field(default_factory=dict)

    def whole(self) -> dict[str, Tensor]:
        """All changes as whole matrices, (out, in)."""
        return self.changes | {key: factors.whole() for key, factors in self.factors.items()}

    def to(self, dtype: torch.dtype) -> GatedWeights:
        """The same in another type."""
        changes = {key: change.to(dtype) for key, change in self.changes.items()}
        return GatedWeights(self.words, changes, {key: factors.to(dtype) for key, factors in self.factors.items()})

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What was learned, under the names that the weights file has for concept ``number``; the very tensors."""
        factors = {name: value for key, own in self.factors.items() for name, value in own.tensors(key).items()}
        return {_name(name, number): value for name, value in (self.changes | factors).items()}


def stored_gates(gates: Sequence[GatedWeights]) -> dict[str, Tensor]:
    """All that the weights file has of gated concepts; no reader of ungated ones knows the names, so each refuses."""
    if not gates:
        return {}
    words = [{"tokens": gate.words.tokens, "classes": gate.words.classes} for gate in gates]
    content = {GATE_NAME: torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)}
    for number, gate in enumerate(gates):
        for key, factors in gate.factors.items():
            content |= {_name(name, number): value for name, value in factors.stored(key).items()}
        content |= {_name(key, number): value for key, value in gate.changes.items()}
    return content


def gates_of(content: dict[str, Tensor]) -> tuple[GatedWeights, ...]:
    """Take the gated concepts out of the content of a weights file; the inverse of :func:`stored_gates`.

    Raises:
        ValueError: where words or changes are missing or broken.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in content if _NAME.fullmatch(name)]:
        match = _NAME.fullmatch(name)
        assert match is not None
        key = f"{match['projection']}{match['low'] or '_custom_diffusion'}.{match['rest']}"
        parts.setdefault(int(match["n"]), {})[key] = content.pop(name)
    if GATE_NAME not in content and not parts:
        return ()
    try:
        words = [
            GatedWords(tuple(entry["tokens"]), tuple(entry["classes"]))
            for entry in json.loads(bytes(content.pop(GATE_NAME).tolist()))
        ]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError("does not say at which words its gated weights act") from error
    if not all(one.tokens and all(isinstance(text, str) for text in one.tokens + one.classes) for one in words):
        raise ValueError("does not say at which words its gated weights act")
    if set(parts) != set(range(len(words))):
        raise ValueError(f"has words of {len(words)} gated concepts, and weights of {len(parts)}")
    gates = []
    for number, one in enumerate(words):
        factors = low_rank_of(parts[number])
        changes = {key: value for key, value in parts[number].items() if "_custom_diffusion." in key}
        if not all(key.endswith(".weight") and value.dim() == 2 for key, value in changes.items()):
            raise ValueError("has gated weights that are no matrices")
        gates.append(GatedWeights(one, changes, factors))
    return tuple(gates)


def _name(key: str, number: int) -> str:
    return key.replace("_low_rank.", "_gated_low_rank.").replace("_custom_diffusion.", "_gated.") + f".{number}"


def class_of(prompt: str) -> str:
    """The class words of a class prompt: "wooden pot" of "a photo of a wooden pot"."""
    return _OPENING.sub("", one_line(prompt).lower(), count=1)


def word_behind(prompt: str, token: str) -> str | None:
    """The word that follows a token in a prompt; None where none does."""
    match = re.search(re.escape(token) + r"\s+([\w-]+)", prompt, re.IGNORECASE)
    return None if match is None else match[1].lower()


def forms_of(words: str) -> set[str]:
    """Class words in the singular and plural that English forms by rule: "pots" for "pot", and "pot" for "pots"."""
    forms = {words, f"{words}s", f"{words}es"}
    if words.endswith("y"):
        forms.add(f"{words[:-1]}ies")
    if words.endswith("ies"):
        forms.add(f"{words[:-3]}y")
    if words.endswith("s") and not words.endswith("ss"):
        forms |= {words[:-1], *([words[:-2]] if words.endswith("es") else [])}
    return forms


class TokenGate:
    """Finds the positions of concepts' words in token ids.

    Args:
        tokenizer: the first of a model's tokenizers, which knows the modifier tokens.
        concepts: the words of each concept.
    """

    def __init__(self, tokenizer: Any, concepts: Sequence[GatedWords]) -> None:
        self.concepts = tuple(concepts)
        self._modifiers = [set(tokenizer.convert_tokens_to_ids(list(one.tokens))) for one in concepts]
        self._every_modifier: set[int] = set().union(*self._modifiers)
        self._classes = [
            sorted(
                {
                    tuple(tokenizer(form, add_special_tokens=False).input_ids)
                    for words in one.classes
                    for form in forms_of(words)
                },
                key=len,
                reverse=True,
            )
            for one in concepts
        ]
        self._pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
        # New words of others too, such as textual inversions.
        self._no_words = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def mask(self, ids: Tensor) -> Tensor:
        """Where each concept acts: (N, length) ids to (N, length, concepts), bool, on the device of the ids."""
        mask = torch.zeros(*ids.shape, len(self.concepts), dtype=torch.bool)
        for row, own in enumerate(ids.tolist()):
            for position, number in enumerate(own):
                if number not in self._every_modifier:
                    continue
                for concept, modifiers in enumerate(self._modifiers):
                    if number in modifiers:
                        end = position + 1 + self._length_behind(own[position + 1 :], concept)
                        mask[row, position:end, concept] = True
        return mask.to(ids.device)

    def _length_behind(self, rest: Sequence[int], concept: int) -> int:
        """How many tokens behind a modifier token are its class words."""
        if self.concepts[concept].classes:
            return next((len(c) for c in self._classes[concept] if tuple(rest[: len(c)]) == c), 0)
        length = 0
        for number in rest:
            piece = self._pieces.get(number, "")
            is_word = any(character.isalnum() for character in piece.removesuffix(END_OF_WORD))
            if number in self._no_words or not is_word:
                break
            length += 1
            if piece.endswith(END_OF_WORD):
                break
        return length


class ReadTexts:
    """Remembers which token ids a text encoder was given, by the features that it gave for them.

    A pipeline hands its UNet features alone, doubled for guidance, repeated for batches, or computed long before. As
    each text's features are those of its ids, a digest of them says which ids these were.

    Args:
        gate: finds the positions.
        text_encoder: the first of a model's.
    """

    MOST = 100_000  # digests that are remembered; the oldest go first

    def __init__(self, gate: TokenGate, text_encoder: Any) -> None:
        self.gate = gate
        self.width = text_encoder.config.hidden_size
        self._masks: OrderedDict[bytes, Tensor] = OrderedDict()
        self._last: tuple[Any, Tensor] | None = None
        self._hook = text_encoder.register_forward_hook(self._remember, with_kwargs=True)

    def remove(self) -> None:
        """Forget all, and leave the text encoder as it was."""
        self._hook.remove()
        self._masks.clear()
        self._last = None

    def _remember(self, text_encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return
        layers = [output[0]] if output[0].dim() == 3 else []
        layers += [getattr(output, "last_hidden_state", None)]
        hidden = list(getattr(output, "hidden_states", None) or ())
        # What pipelines make of a layer before the last: Stable Diffusion's clip_skip norms it, XL takes it as it is.
        norm = getattr(getattr(text_encoder, "text_model", text_encoder), "final_layer_norm", None)
        layers += hidden + ([norm(layer) for layer in hidden] if norm is not None else [])
        self.remember([layer for layer in layers if layer is not None], self.gate.mask(ids).cpu())

    def remember(self, layers: Sequence[Tensor], mask: Tensor) -> None:
        """Remember features (N, length, width) of texts, and where concepts act in them, (N, length, concepts)."""
        for layer in layers:
            for dtype in dict.fromkeys([layer.dtype, torch.float16, torch.bfloat16]):
                for row, positions in zip(layer.detach().to(dtype), mask, strict=True):
                    self._masks[_digest(row)] = positions
        while len(self._masks) > self.MOST:
            self._masks.popitem(last=False)

    def mask(self, features: Tensor) -> Tensor:
        """Where each concept acts in text features, (N, length, width of all encoders): (N, length, concepts), bool.

        Features of zeros, which Stable Diffusion XL takes for an empty text, name nothing.

        Raises:
            UserError: for features that the text encoder has not given.
        """
        if self._last is not None and self._last[0]() is features:
            return self._last[1]
        own = features[..., : self.width].detach()
        masks = []
        for row in own:
            mask = self._masks.get(_digest(row))
            if mask is None and not bool(row.any()):
                mask = torch.zeros(len(row), len(self.gate.concepts), dtype=torch.bool)
            if mask is None:
                raise UserError(
                    "these text features were not made by this pipeline's text encoder since the concept was applied, "
                    "so nobody knows at which of them its words stand: give `prompt` and `negative_prompt`, or what "
                    "this pipeline's encode_prompt makes of them, rather than other prompt_embeds"
                )
            masks.append(mask)
        found = torch.stack(masks).to(features.device)
        self._last = (weakref.ref(features), found)
        return found


def _digest(row: Tensor) -> bytes:
    """A digest of the features of a text, the same for a type that they were widened to."""
    return hashlib.blake2b(row.float().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()


class GatedUNet:
    """Concepts at their own words inside a UNet; :meth:`remove` takes them out, and nothing else was changed.

    The UNet's projections stay as they are. Behind each of them the changes are added at the positions of the words,
    so that texts without such words take exactly the base model's way.

    Args:
        unet: the UNet itself.
        texts: knows the positions.
        layers: for each projection that is changed: its module, the name of a buffer that holds a change, and the
            number of the concept. The changes are buffers of the modules, so they move and change type with them.
        scales: of each concept.
    """

    def __init__(
        self, unet: Any, texts: ReadTexts, layers: Sequence[tuple[Any, str, int]], scales: Sequence[float]
    ) -> None:
        self.texts = texts
        self.scales = list(scales)
        self._layers = list(layers)
        self._mask: Tensor | None = None
        self._places: dict[int, Tensor] = {}  # as rows of features (N * length, width)
        self._added: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._attention = [module for name, module in unet.named_modules() if name.endswith("attn2")]
        self._hooks = [unet.register_forward_pre_hook(self._find, with_kwargs=True)]
        self._hooks += [module.register_forward_hook(partial(self._add, name, n)) for module, name, n in layers]

    def remove(self) -> None:
        """Take the concepts out."""
        for hook in self._hooks:
            hook.remove()
        self._added = {}
        for module, name, _ in self._layers:
            if hasattr(module, name):
                delattr(module, name)
        self.texts.remove()

    def _find(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(getattr(module, "fused_projections", False) for module in self._attention):
            raise UserError("fuse_qkv_projections() bypasses gated concepts: call unfuse_qkv_projections() first")
        features = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        mask = self.texts.mask(features)
        if mask is self._mask:  # as in every denoising step of an image but the first
            return
        self._mask, self._places, self._added = mask, {}, {}
        for number, scale in enumerate(self.scales):
            places = mask[..., number].flatten().nonzero()[:, 0]
            if len(places) and scale:
                self._places[number] = places

    def _add(self, name: str, number: int, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if number not in self._places:
            return output
        known = self._added.get((id(module), number))
        # A prompt's features are the same in all denoising steps, and so is what is added to its keys and values.
        if known is None or known[0] is not args[0]:
            known = self._added[id(module), number] = (args[0], self._change(name, number, module, args[0], output))
        output = output.contiguous()
        output.view(-1, output.shape[-1]).index_add_(0, self._places[number], known[1])
        return output

    @torch.no_grad()
    def _change(self, name: str, number: int, module: Any, features: Tensor, output: Tensor) -> Tensor:
        """What a concept adds to a projection's output at its places: (number of places, channels)."""
        assert self._mask is not None
        if features.shape[:2] != output.shape[:2] or features.shape[:2] != self._mask.shape[:2]:
            raise UserError("this pipeline splits its UNet's text features, which gated concepts do not support")
        change = getattr(module, name).to(features.device, features.dtype)
        added = self.scales[number] * (features.flatten(0, 1)[self._places[number]] @ change.T)
        return added.to(output.dtype)


@contextmanager
def gates_beside_features(unet: Any, text_encoder: Any, gate: TokenGate) -> Iterator[None]:
    """Within, a UNet in training finds the gate behind the text features, where a pipeline gives it features alone."""
    texts = ReadTexts(gate, text_encoder)

    def widen(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        features = kwargs["encoder_hidden_states"]
        wide = torch.cat([features, texts.mask(features).to(features)], dim=-1)
        return args, kwargs | {"encoder_hidden_states": wide}

    hook = unet.register_forward_pre_hook(widen, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        texts.remove()
