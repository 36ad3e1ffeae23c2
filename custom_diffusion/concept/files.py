"""A learned concept, and its files on disk.

This module is the only place that knows our own format. A concept is a folder (or a Hub repository) with

- ``pytorch_custom_diffusion_weights.safetensors`` and/or ``.bin``: the trained cross-attention
  projections, under the keys of diffusers' Custom Diffusion processors
  (or, where these were trained as a change of low rank, its factors: :mod:`low_rank` has their keys; or, where they
  act at the concept's own words alone, their changes and these words: :mod:`gating` has the keys);
- ``<new1>.safetensors`` and/or ``.bin``, one per modifier token: ``{"<new1>": vector of shape (width,)}``, or where
  the base model has several text encoders, as Stable Diffusion XL has, a vector of shape (1, width) for each:
  ``{"clip_l": ..., "clip_g": ...}``, as other programs name and read them;
- ``README.md``: a model card whose ``base_model`` says which model the weights belong to.

The authors' ``delta.bin`` is read in place of these (:mod:`formats` knows its layout).
Files of strangers are read as safetensors or with ``weights_only=True``, so that reading never runs code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import ModelCard, snapshot_download
from torch import Tensor

from custom_diffusion.concept import formats
from custom_diffusion.concept.gating import GATE_NAME, GatedWeights, gates_of, stored_gates
from custom_diffusion.concept.low_rank import LowRank, is_low_rank, low_rank_of
from custom_diffusion.errors import UserError
from custom_diffusion.files import has_hub_form, is_hub_id, read_text, write_by_name, write_whole
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.families import FAMILIES, family_with
from custom_diffusion.text import first_line

logger = logging.getLogger("custom_diffusion")

WEIGHTS_STEM = "pytorch_custom_diffusion_weights"
DELTA_STEMS = ("delta", "compressed_delta")  # as the authors' training and their compress.py name the file
CARD_NAME = "README.md"
MOST_DOWNLOADED_BYTES = 5 * 2**29  # all projections of Stable Diffusion XL take 2.03 GiB in fp32
MAX_TOKEN_BYTES = 200  # file names hold 255 bytes; the ending and a temporary name need some of them

# Windows forbids more than a separator needs, the customary angle brackets among it.
_NOT_IN_FILE_NAMES = '/\\:<>"|?*' if os.name == "nt" else "/\\:"


@dataclass(frozen=True)
class Concept:
    """What Custom Diffusion learned.

    Attributes:
        attention: the trained projections in float32 or as stored, keyed as diffusers' processors name them
            (``...attn2.processor.to_k_custom_diffusion.weight`` of shape (hidden size, text width), ``to_v``,
            and with ``crossattn`` also ``to_q`` and ``to_out``). Empty where only tokens were learned.
        tokens: modifier token to its embeddings, one per text encoder of the base model, by the encoder's name:
            ``{"<new1>": {"text_encoder": vector of shape (text width,)}}``.
        base_model: the model that was fine-tuned (Hub id or folder), where it is known.
        base_revision, base_variant, base_tokenizer, base_vae: what else it takes to load it as it was trained, see
            :class:`BaseModel`.
        source: where the concept was read from, for messages.
        differences: keyed like ``attention``, projections that are known only as a difference of low rank from the
            base model's (``--rank``, and the authors' compressed files); :func:`complete` turns them into
            ``attention``.
        instance_prompt: what the card says of the prompts it was trained on.
        gates: what acts at the words of one concept alone (``--token_gate``), for each concept.
    """

    attention: dict[str, Tensor]
    tokens: dict[str, dict[str, Tensor]]
    base_model: str | None = None
    source: str = "the concept"
    differences: dict[str, LowRank] = field(default_factory=dict)
    instance_prompt: str | None = None
    base_revision: str | None = None
    base_variant: str | None = None
    base_tokenizer: str | None = None
    base_vae: str | None = None
    gates: tuple[GatedWeights, ...] = ()

    def trained_on(self, base_model: BaseModel) -> Concept:
        """The same concept, with all that it takes to load this base model."""
        return replace(
            self,
            base_model=base_model.name,
            base_revision=base_model.revision,
            base_variant=base_model.variant,
            base_tokenizer=base_model.tokenizer,
            base_vae=base_model.other_vae,
        )

    def to(self, dtype: torch.dtype) -> Concept:
        """The same concept with its weights in another type; its tokens, which take next to nothing, stay float32."""
        return replace(
            self,
            attention={key: weight.to(dtype) for key, weight in self.attention.items()},
            differences={key: difference.to(dtype) for key, difference in self.differences.items()},
            gates=tuple(gate.to(dtype) for gate in self.gates),
        )

    def without_local_paths(self) -> Concept:
        """The same concept for a card that others read: folders of this machine are nobody's business."""
        concept = self
        if self.base_model is not None and not is_hub_id(self.base_model):
            concept = replace(concept, base_model=None, base_revision=None, base_variant=None)
        if self.base_tokenizer is not None and not is_hub_id(self.base_tokenizer):
            concept = replace(concept, base_tokenizer=None)
        if self.base_vae is not None and not is_hub_id(self.base_vae):
            concept = replace(concept, base_vae=None)
        return concept

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was learned, by name: projections, factors, and ``<new1> of text_encoder``."""
        vectors = {f"{token} of {name}": vector for token, own in self.tokens.items() for name, vector in own.items()}
        factors = {name: value for key, own in self.differences.items() for name, value in own.tensors(key).items()}
        gated = {name: value for n, gate in enumerate(self.gates) for name, value in gate.tensors(n).items()}
        return self.attention | factors | gated | vectors

    def projections(self) -> list[str]:
        """The keys of all projections that were trained, whole or as a difference."""
        return [*self.attention, *self.differences]


def check_token_name(token: str) -> None:
    """Refuse a modifier token that could not safely be a file name of its own.

    Raises:
        UserError: for a token that is empty, holds white space or control characters, is too long,
            or would be read as a path.
    """
    if not token:
        raise UserError("a modifier token is empty; write for example --modifier_token '<new1>+<new2>'")
    if any(character.isspace() or not character.isprintable() for character in token):
        raise UserError(f"the modifier token {token!r} holds white space or an unprintable character")
    if token.startswith(".") or any(character in token for character in _NOT_IN_FILE_NAMES):
        raise UserError(
            f"the modifier token {token!r} would be a path: each token becomes a file name, "
            f"so it must not start with '.' or hold any of {_NOT_IN_FILE_NAMES}"
        )
    if len(token.encode()) > MAX_TOKEN_BYTES:
        raise UserError(
            f"the modifier token {token[:20]!r}... is longer than {MAX_TOKEN_BYTES} bytes, too long for a file name"
        )
    if token == WEIGHTS_STEM:
        raise UserError(f"the modifier token {token!r} is the name of the weights file; take another one")


def _is_token_name(token: str) -> bool:
    try:
        check_token_name(token)
    except UserError:
        return False
    return True


def save_concept(
    concept: Concept, folder: str | os.PathLike, safetensors_too: bool = True, bin_too: bool = True
) -> list[str]:
    """Write the weights and one file per token.

    Both formats hold an empty entry per self-attention processor: diffusers' ``load_attn_procs`` wants to hear
    of every processor of the UNet, and takes an empty entry for one that was not trained. It does not read low-rank
    differences.

    Args:
        folder: made if it is not there.
        safetensors_too, bin_too: which of the two formats to write.

    Returns:
        The names of the files written, relative to ``folder``.

    Raises:
        UserError: for a token that cannot be a file name, or values that are not finite; nothing is written then.
    """
    folder = Path(folder)
    for token in concept.tokens:
        check_token_name(token)
    _check_finite(concept)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(concept.attention)
    for key, difference in concept.differences.items():
        weights |= difference.stored(key)
    weights |= stored_gates(concept.gates)
    cpu = _to_save(weights)
    untrained = sorted({key.split(".attn2.")[0] + ".attn1.processor" for key in concept.attention})
    files = {token: _token_file(token, vectors) for token, vectors in concept.tokens.items()}
    written = []
    if safetensors_too:
        contents: dict[str, dict[str, Any]] = dict(files)
        if cpu:
            contents[WEIGHTS_STEM] = cpu | {name: torch.empty(0) for name in untrained}
        for stem, tensors in contents.items():
            # By name, which copies nothing: as bytes they would be in memory a second time.
            about = {GATE_NAME: "; ".join(str(gate.words) for gate in concept.gates)} if concept.gates else {}
            save = partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"} | about)
            write_by_name(folder / f"{stem}.safetensors", save)
            written.append(f"{stem}.safetensors")
    if bin_too:
        contents = dict(files)
        if cpu:
            contents[WEIGHTS_STEM] = cpu | {name: {} for name in untrained}
        for stem, tensors in contents.items():
            write_whole(folder / f"{stem}.bin", partial(torch.save, tensors))
            written.append(f"{stem}.bin")
    return written


def concept_files(folder: Path) -> list[Path]:
    """The files of weights and tokens that :func:`load_concept` would read in a folder, in both formats.

    Raises:
        UserError: for a damaged file, which may be a token's.
    """
    found = []
    for ending in (".safetensors", ".bin"):
        for stem, path in _weight_files(folder, (ending,)).items():
            if stem == WEIGHTS_STEM or (_is_token_name(stem) and _vectors_of_token(path, stem, _read_tensors(path))):
                found.append(path)
    return found


def load_concept(source: str | os.PathLike) -> Concept:
    """Read a concept from a folder, a training checkpoint, the authors' ``delta.bin`` or a Hub repository.

    Safetensors are preferred; a ``.bin`` is read with ``weights_only=True``.

    Args:
        source: folder, file of the authors', or Hub id; a revision follows the id as in ``owner/name@revision``.

    Raises:
        UserError: where there is no concept, or a file is broken, would run code, or holds values that are
            not finite.
    """
    path = _local_path(str(source))
    folder = path if path.is_dir() else path.parent
    files = _weight_files(folder)
    delta = next((files[stem] for stem in DELTA_STEMS if stem in files), None)
    gates: tuple[GatedWeights, ...] = ()
    if path.is_file():
        attention, differences, tokens = _read_delta(path)
    elif delta is not None and WEIGHTS_STEM not in files:
        attention, differences, tokens = _read_delta(delta)
    else:
        attention, differences, tokens, gates = _read_own_files(files)
    if not attention and not differences and not tokens and not gates:
        raise UserError(
            f"no concept in {str(source)!r}: there is no {WEIGHTS_STEM}.safetensors or .bin, no token file and no "
            "delta.bin; give the --output_dir of a training run, one of its checkpoints, or a Hub repository"
        )
    card = _read_card(folder)
    concept = Concept(attention, tokens, source=str(source), differences=differences, gates=gates, **card)
    _check_finite(concept)
    missing = [token for gate in gates for token in gate.words.tokens if token not in tokens]
    if missing:
        raise UserError(f"{str(source)!r} lacks the file of {missing[0]!r}, at which its weights act")
    return concept


def _read_own_files(
    files: Mapping[str, Path],
) -> tuple[dict[str, Tensor], dict[str, LowRank], dict[str, dict[str, Tensor]], tuple[GatedWeights, ...]]:
    attention: dict[str, Tensor] = {}
    differences: dict[str, LowRank] = {}
    gates: tuple[GatedWeights, ...] = ()
    tokens: dict[str, dict[str, Tensor]] = {}
    for stem, path in files.items():
        content = _read_tensors(path)
        if stem == WEIGHTS_STEM:
            content = _trained_entries(path, content)
            try:
                gates = gates_of(content)
                differences = low_rank_of(content)
            except ValueError as error:
                raise UserError(f"{path} {error}") from error
            attention = {key: value for key, value in content.items() if not is_low_rank(key)}
            foreign = next((key for key in attention if not formats.KEY.fullmatch(key)), None)
            if foreign is not None:
                raise UserError(f"{path} is no Custom Diffusion file: it holds {foreign!r}")
        elif vectors := _vectors_of_token(path, stem, content):
            if _is_token_name(stem):
                tokens[stem] = vectors
            else:
                logger.warning(f"{str(path)!r} is left out: no word can have that name")
    return attention, differences, tokens, gates


def _trained_entries(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The content of a weights file without the empty entries, which stand for processors that were not trained."""
    for key, value in content.items():
        is_entry = value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, dict) and not value
        if not is_entry:
            raise UserError(f"{path} is no Custom Diffusion file: it holds {key!r}")
    return {key: value for key, value in content.items() if len(value) > 0}


def vectors_by_key(token: str, vectors: Mapping[str, Tensor]) -> dict[str | None, Tensor]:
    """A token's vectors under the keys that they have in files, see :class:`families.TextEncoder`.

    Raises:
        UserError: for vectors that are for no family's text encoders.
    """
    family = family_with(vectors)
    if family is None:
        raise UserError(
            f"the modifier token {token!r} has embeddings for {', '.join(vectors)}: no family that is known"
        )
    return {part.token_key: vectors[part.name] for part in family.text_encoders}


def _token_file(token: str, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The content of a token's file: its vector under its own name, or several under the names of their encoders."""
    by_key = vectors_by_key(token, vectors)
    # The example writes a vector by itself; the programs that know the names of encoders want rows.
    return _to_save({key or token: vector.unsqueeze(0) if key else vector for key, vector in by_key.items()})


def _vectors_of_token(path: Path, token: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of :func:`_token_file`; nothing for a file that is no token's.

    Raises:
        UserError: for a file that has the vectors of some of a family's text encoders.
    """
    if not all(isinstance(vector, Tensor) for vector in content.values()):
        return {}
    # The clones leave behind the whole embedding table that the example stores with each vector.
    vectors = {key: vector.clone().squeeze(0) if vector.dim() == 2 else vector for key, vector in content.items()}
    if not all(vector.dim() == 1 for vector in vectors.values()):
        return {}
    for family in FAMILIES:
        keys = {part.token_key or token: part.name for part in family.text_encoders}
        if set(keys) == set(vectors):
            return {name: vectors[key].clone() for key, name in keys.items()}
        if vectors and vectors.keys() < keys.keys():
            missing = ", ".join(key for key in keys if key not in vectors)
            raise UserError(f"{path} lacks {missing}: a word of {family.name} has a vector for each text encoder")
    return {}


def _to_save(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory and without gradient, each with memory of its own; copied only where they have to be.

    A view would be stored with all the memory behind it (the example's token files are 152 MB), and safetensors stores
    no memory twice. But a copy of all that is trained of Stable Diffusion XL takes 1.4 GB.
    """
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.data_ptr())
        separate[name] = tensor
    return separate


def _check_finite(concept: Concept) -> None:
    for name, tensor in concept.tensors().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name!r} of {concept.source!r} holds values that are not finite: its training failed")


def _read_delta(path: Path) -> tuple[dict[str, Tensor], dict[str, LowRank], dict[str, dict[str, Tensor]]]:
    try:
        attention, differences, tokens = formats.from_delta(_read_tensors(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    for token in tokens:
        check_token_name(token)
    return attention, differences, {token: _by_text_encoder(path, token, own) for token, own in tokens.items()}


def _by_text_encoder(path: Path, token: str, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The vectors of a delta's token, which stand in the order of the text encoders, by the encoders' names."""
    for family in FAMILIES:
        if len(family.text_encoders) == len(vectors):
            # Clones as above: whoever saved these may have stored views too.
            return {part.name: vector.clone() for part, vector in zip(family.text_encoders, vectors, strict=True)}
    raise UserError(f"{path} has {len(vectors)} vectors for {token!r}: no family that is known has as many encoders")


def _local_path(source: str) -> Path:
    """The folder (or file) itself, or the local copy of a Hub repository."""
    if Path(source).exists():
        return Path(source)
    name, _, revision = source.partition("@")
    if not has_hub_form(name):
        raise UserError(f"there is no folder {source!r}: give the --output_dir of a training run, or a Hub id")

    def download(pattern: str) -> Path:
        wanted = partial(
            snapshot_download,
            name,
            revision=revision or None,
            allow_patterns=[pattern, CARD_NAME],
            ignore_patterns=["*/*"],
        )
        plan: Any = wanted(dry_run=True)
        size = sum(file.file_size or 0 for file in plan if file.will_download)
        if size > MOST_DOWNLOADED_BYTES:
            raise UserError(f"{source!r} has {size / 2**30:.1f} GiB of weights: no concept is that large, refused")
        return Path(wanted())

    try:
        # First what is safe to read; the pickles only where there is nothing else.
        folder = download("*.safetensors")
        if not (folder / f"{WEIGHTS_STEM}.safetensors").exists():
            folder = download("*.bin")
    except UserError:
        raise
    except Exception as error:  # the Hub client raises its own, requests' and httpx's errors
        reason = first_line(error)
        raise UserError(f"there is no folder {source!r}, and the Hub does not give it either: {reason}") from error
    return folder


def _weight_files(folder: Path, endings: Sequence[str] = (".safetensors", ".bin")) -> dict[str, Path]:
    """Stem to file for every tensor file at the top of ``folder``, of several the one with the first ending."""
    files: dict[str, Path] = {}
    for ending in endings:
        for path in sorted(folder.glob(f"*{ending}")):
            if not path.name.startswith("."):
                files.setdefault(path.name.removesuffix(ending), path)
    return files


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # mmap: the example's token files carry a whole embedding table that nobody needs in memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # safetensors, pickle, zip and struct errors all mean the same to the user
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise UserError(f"{path} holds more than tensors and could run code when read: refused") from error
        raise UserError(f"{path} cannot be read: it is damaged or no weights file") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} cannot be read: it holds no table of weights")
    return content


# What our cards say in their headers; the first two are the Hub's own names.
CARD_KEYS = {
    "base_model": "base_model",
    "instance_prompt": "instance_prompt",
    "base_revision": "base_model_revision",
    "base_variant": "base_model_variant",
    "base_tokenizer": "base_model_tokenizer",
    "base_vae": "base_model_vae",
}


def _read_card(folder: Path) -> dict[str, str]:
    """What the card says of base model and prompts, by the attributes of :class:`Concept`."""
    # A checkpoint inside an output folder has its own card; the parent's is no fallback, it may be another run's.
    card = folder / CARD_NAME
    if not card.is_file():
        return {}
    try:
        data = ModelCard(read_text(card)).data.to_dict()
    except Exception:  # a card is written by people: whatever is wrong with its header, the weights are still good
        return {}
    said = {attribute: data.get(key) for attribute, key in CARD_KEYS.items()}
    firsts = {name: value[0] if isinstance(value, list) and value else value for name, value in said.items()}
    return {name: value for name, value in firsts.items() if isinstance(value, str)}


def find_base_model(
    given: str | None,
    revision: str | None,
    variant: str | None,
    concepts: Sequence[Concept],
    tokenizer: str | None = None,
    other_vae: str | None = None,
) -> BaseModel:
    """The base model of the command line, or else the one that the concepts' cards name.

    Args:
        given, revision, variant, tokenizer, other_vae: of the command line. What it leaves out of the last four is
            taken from a card that names the same model.

    Raises:
        UserError: where none is known, the cards disagree, or there is no such folder.
    """
    named = [concept for concept in concepts if concept.base_model is not None]
    if given is None:
        _check_agreement(named, "base_model", "--pretrained_model_name_or_path")
    name = given or next((concept.base_model for concept in named), None)
    if name is None:
        raise UserError(f"the card of {concepts[0].source!r} names no base model: give --pretrained_model_name_or_path")
    if not Path(name).is_dir() and not is_hub_id(name):
        raise UserError(f"there is no base model folder {name!r}: give --pretrained_model_name_or_path")
    same = [concept for concept in named if concept.base_model == name]
    if revision is None:
        revision = _check_agreement(same, "base_revision", "--revision")
    if tokenizer is None:
        tokenizer = _check_agreement(same, "base_tokenizer", "--tokenizer_name")
    if variant is None and same:
        variant = same[0].base_variant  # the same weights, in other files
    if other_vae is None:
        other_vae = _check_agreement(same, "base_vae", "--pretrained_vae_model_name_or_path")
    return BaseModel(name, revision, variant, tokenizer, other_vae)


def _check_agreement(concepts: Sequence[Concept], attribute: str, flag: str) -> str | None:
    """What all the concepts' cards say.

    Raises:
        UserError: where two say something else.
    """
    first: Concept | None = None
    for concept in concepts:
        first = first or concept
        one, other = getattr(first, attribute), getattr(concept, attribute)
        if one != other:
            what = attribute.removeprefix("base_").replace("model", "base model").replace("vae", "VAE")
            raise UserError(
                f"{first.source!r} was trained with the {what} {one!r} and {concept.source!r} with {other!r}; "
                f"if these are the same, give {flag}"
            )
    return None if first is None else getattr(first, attribute)
