"""A learned concept: its files on disk, and how it goes into a pipeline and out again.

This module is the only place that knows the format. A concept is a folder (or a Hub repository) with

- ``pytorch_custom_diffusion_weights.safetensors`` and/or ``.bin``: the trained cross-attention
  projections, under the keys of diffusers' Custom Diffusion processors;
- ``<new1>.safetensors`` and/or ``.bin``, one per modifier token: ``{"<new1>": vector of shape (width,)}``;
- ``README.md``: a model card whose ``base_model`` says which model the weights belong to.

The authors' ``delta.bin`` is read in place of these (:mod:`formats` knows its layout).
Files of strangers are read as safetensors or with ``weights_only=True``, so that reading never runs code.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from torch import Tensor, nn

import formats
from images import first_line, write_whole

WEIGHTS_STEM = "pytorch_custom_diffusion_weights"
DELTA_STEMS = ("delta", "compressed_delta")  # as the authors' training and their compress.py name the file
CARD_NAME = "README.md"
MOST_DOWNLOADED_BYTES = 2 * 2**30  # a concept of all projections of the largest base models takes a tenth of it
MAX_TOKEN_BYTES = 200  # file names hold 255 bytes; the ending and a temporary name need some of them

# Windows forbids more than a separator needs, the customary angle brackets among it.
_NOT_IN_FILE_NAMES = '/\\:<>"|?*' if os.name == "nt" else "/\\:"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class UserError(ValueError):
    """A concept that cannot be read, written or applied; the message is one line made for the user."""


@dataclass(frozen=True)
class Concept:
    """What Custom Diffusion learned.

    Attributes:
        attention: the trained projections in float32 or as stored, keyed as diffusers' processors name them
            (``...attn2.processor.to_k_custom_diffusion.weight`` of shape (hidden size, text width), ``to_v``,
            and with ``crossattn`` also ``to_q`` and ``to_out``). Empty where only tokens were learned.
        tokens: modifier token to its embedding, shape (text width,).
        base_model: the model that was fine-tuned (Hub id or folder), where it is known.
        source: where the concept was read from, for messages.
        differences: keyed like ``attention``, projections that are known only as difference from the base model's
            (the authors' compressed files); :func:`complete` turns them into ``attention``.
        instance_prompt: what the card says of the prompts it was trained on.
    """

    attention: dict[str, Tensor]
    tokens: dict[str, Tensor]
    base_model: str | None = None
    source: str = "the concept"
    differences: dict[str, Tensor] = field(default_factory=dict)
    instance_prompt: str | None = None


# --- names ---------------------------------------------------------------------------------------


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


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a Hub repository, ``owner/name``, and is no local file or folder."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def class_words(concept: Concept) -> dict[str, str]:
    """Modifier token to the words that follow it in the instance prompts of the card: its class, ``cat``.

    Tokens that no prompt of the card has are left out.
    """
    words = {}
    for token in concept.tokens:
        match = re.search(re.escape(token) + r"\s+([^,.;:!?<]+)", concept.instance_prompt or "")
        if match is not None:
            words[token] = match[1].strip()
    return words


# --- writing -------------------------------------------------------------------------------------


def new_folder(path: str | os.PathLike) -> Path:
    """Make a folder for a result.

    Raises:
        UserError: where that is not possible, or the folder holds something: nothing there is replaced.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"--output_dir {str(path)!r} cannot be made: {error.strerror}") from error
    if occupied is not None:
        raise UserError(f"--output_dir {str(path)!r} holds {occupied.name!r} already: give a new or empty folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {str(path)!r} cannot be written to")
    return folder


def save_concept(
    concept: Concept, folder: str | os.PathLike, safetensors_too: bool = True, bin_too: bool = True
) -> list[str]:
    """Write the weights and one file per token.

    Both formats hold an empty entry per self-attention processor: diffusers' ``load_attn_procs`` wants to hear
    of every processor of the UNet, and takes an empty entry for one that was not trained.

    Args:
        folder: made if it is not there.
        safetensors_too, bin_too: which of the two formats to write.

    Returns:
        The names of the files written, relative to ``folder``.

    Raises:
        UserError: for a token that cannot be a file name, values that are not finite, or differences whose base
            model is not known here; nothing is written then.
    """
    folder = Path(folder)
    if concept.differences:
        raise UserError(f"{concept.source!r} is compressed: complete it with its base model before saving it")
    for token in concept.tokens:
        check_token_name(token)
    _check_finite(concept)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones, because a view would be stored with all the memory behind it: the example's token files are 152 MB.
    cpu = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in concept.attention.items()}
    untrained = sorted({key.split(".attn2.")[0] + ".attn1.processor" for key in cpu})
    files = {token: {token: vector.detach().to("cpu", copy=True)} for token, vector in concept.tokens.items()}
    written = []
    if safetensors_too:
        contents = dict(files)
        if cpu:
            contents[WEIGHTS_STEM] = cpu | {name: torch.empty(0) for name in untrained}
        for stem, tensors in contents.items():
            data = safetensors.torch.save(tensors, metadata={"format": "pt"})
            write_whole(folder / f"{stem}.safetensors", lambda file, data=data: file.write(data))
            written.append(f"{stem}.safetensors")
    if bin_too:
        contents = dict(files)
        if cpu:
            contents[WEIGHTS_STEM] = cpu | {name: {} for name in untrained}
        for stem, tensors in contents.items():
            write_whole(folder / f"{stem}.bin", lambda file, tensors=tensors: torch.save(tensors, file))
            written.append(f"{stem}.bin")
    return written


# --- reading -------------------------------------------------------------------------------------


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
    if path.is_file() or (delta is not None and WEIGHTS_STEM not in files):
        attention, differences, tokens = _read_delta(path if path.is_file() else delta)
    else:
        attention, tokens = _read_own_files(files)
        differences = {}
    if not attention and not differences and not tokens:
        raise UserError(
            f"no concept in {str(source)!r}: there is no {WEIGHTS_STEM}.safetensors or .bin, no token file and no "
            "delta.bin; give the --output_dir of a training run, one of its checkpoints, or a Hub repository"
        )
    base_model, instance_prompt = _read_card(folder)
    concept = Concept(attention, tokens, base_model, str(source), differences, instance_prompt)
    _check_finite(concept)
    return concept


def _read_own_files(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    attention: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for stem, path in files.items():
        content = _read_tensors(path)
        if stem == WEIGHTS_STEM:
            # Empty entries stand for processors that were not trained.
            attention = {key: value for key, value in content.items() if len(value) > 0}
            foreign = next((key for key in attention if not formats.KEY.fullmatch(key)), None)
            if foreign is not None:
                raise UserError(f"{path} is no Custom Diffusion file: it holds {foreign!r}")
        elif set(content) == {stem} and isinstance(content[stem], Tensor) and content[stem].dim() == 1:
            # The clone leaves behind the whole embedding table that the example stores with each vector.
            tokens[stem] = content[stem].clone()
    return attention, tokens


def _check_finite(concept: Concept) -> None:
    for name, tensor in (concept.attention | concept.differences | concept.tokens).items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name!r} of {concept.source!r} holds values that are not finite: its training failed")


def _read_delta(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    try:
        attention, differences, tokens = formats.from_delta(_read_tensors(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    for token in tokens:
        check_token_name(token)
    # Clones as above: whoever saved these may have stored views too.
    return attention, differences, {token: vector.clone() for token, vector in tokens.items()}


def _local_path(source: str) -> Path:
    """The folder (or file) itself, or the local copy of a Hub repository."""
    if Path(source).exists():
        return Path(source)
    name, _, revision = source.partition("@")
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"there is no folder {source!r}: give the --output_dir of a training run, or a Hub id")

    def download(pattern: str) -> Path:
        wanted = partial(
            snapshot_download,
            name,
            revision=revision or None,
            allow_patterns=[pattern, CARD_NAME],
            ignore_patterns=["*/*"],
        )
        size = sum(file.file_size or 0 for file in wanted(dry_run=True) if file.will_download)
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


def _weight_files(folder: Path) -> dict[str, Path]:
    """Stem to file for every tensor file at the top of ``folder``, safetensors before ``.bin``."""
    files: dict[str, Path] = {}
    for ending in (".safetensors", ".bin"):
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
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read: it holds no table of weights")
    return content


def _read_card(folder: Path) -> tuple[str | None, str | None]:
    """Base model and instance prompt, as far as the card names them."""
    # A checkpoint inside an output folder has its own card; the parent's is no fallback, it may be another run's.
    card = folder / CARD_NAME
    if not card.is_file():
        return None, None
    try:
        data = ModelCard.load(card).data.to_dict()
    except Exception:  # a card is written by people: whatever is wrong with its header, the weights are still good
        return None, None
    base_model, instance_prompt = data.get("base_model"), data.get("instance_prompt")
    if isinstance(base_model, list):
        base_model = base_model[0] if base_model else None
    return (
        base_model if isinstance(base_model, str) else None,
        instance_prompt if isinstance(instance_prompt, str) else None,
    )


def complete(concept: Concept, base: Mapping[str, Tensor]) -> Concept:
    """The concept with full projections in place of differences.

    Args:
        base: the base model's projections, keyed like ``attention``; for every key of ``differences``.

    Raises:
        UserError: where a difference does not fit its projection.
    """
    attention = dict(concept.attention)
    for key, difference in concept.differences.items():
        if key not in base or base[key].shape != difference.shape:
            raise UserError(f"{_trained_on(concept)}; the base model given has no fitting {key!r}")
        attention[key] = base[key].float() + difference
    return replace(concept, attention=attention, differences={})


# --- applying ------------------------------------------------------------------------------------


@dataclass
class AppliedConcept:
    """Concepts inside a pipeline; :meth:`remove` takes them out again, exactly."""

    pipeline: Any
    tokens: list[str]
    _weights: list[tuple[nn.Parameter, Tensor]] = field(repr=False)
    _tokenizer: Any = field(repr=False)
    _table_rows: int = field(repr=False)
    _covered_rows: Tensor = field(repr=False)

    def remove(self) -> None:
        """Restore UNet, text encoder and tokenizer to the values they had before."""
        with torch.no_grad():
            for parameter, original in self._weights:
                parameter.copy_(original)
            if self.tokens:
                encoder = self.pipeline.text_encoder
                first = len(self._tokenizer)
                table = encoder.get_input_embeddings().weight
                table[first : first + len(self._covered_rows)] = self._covered_rows
                encoder.resize_token_embeddings(self._table_rows, mean_resizing=False)
                self.pipeline.tokenizer = self._tokenizer
        self.pipeline.unet._applied_concept = None


def apply_concepts(pipeline: Any, *concepts: Concept, scale: float = 1.0) -> AppliedConcept:
    """Put one or several concepts into any pipeline of the Stable Diffusion family.

    The learned keys and values (and queries and outputs) are copied into the UNet's own ``attn2`` projections and
    the tokens into tokenizer and text encoder. Nothing is added to the forward pass, so speed stays as it was, and
    image-to-image, ControlNet or LoRA pipelines work as they do on the base model.

    Args:
        pipeline: has ``unet``, ``text_encoder`` and ``tokenizer``.
        concepts: several must agree wherever they trained the same projections (merging is another matter).
        scale: 0 keeps the base model's projections, 1 takes the learned ones, between and beyond blends linearly.
            Token embeddings have no counterpart in the base model and always go in whole.

    Returns:
        A handle whose ``remove()`` restores the pipeline exactly.

    Raises:
        UserError: where a concept does not fit the pipeline or the others; nothing is changed then.
    """
    attention, tokens = _combine(concepts)
    if getattr(pipeline.unet, "_applied_concept", None) is not None:
        raise UserError("this pipeline already has a concept: remove() it first, or apply all of them in one call")
    parameters = {key: _find_parameter(pipeline.unet, key, concept) for key, (_, concept) in attention.items()}
    for key, parameter in parameters.items():
        _check_fit(key, attention[key][0], parameter, attention[key][1], pipeline)
    if tokens:
        check_new_tokens(tokens, pipeline.tokenizer, pipeline.text_encoder)

    weights = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    table = encoder.get_input_embeddings().weight
    applied = AppliedConcept(
        pipeline, list(tokens), weights, tokenizer, len(table), table[len(tokenizer) :][: len(tokens)].clone()
    )
    with torch.no_grad():
        for key, parameter in parameters.items():
            value, concept = attention[key]
            original, learned = parameter.float(), value.to(parameter.device, torch.float32)
            if key in concept.differences:
                learned = original + learned
            parameter.copy_(torch.lerp(original, learned, scale))
        if tokens:
            # Other pipelines may share the tokenizer object: ours becomes a copy, and theirs does not change.
            pipeline.tokenizer = copy.deepcopy(tokenizer)
            pipeline.tokenizer.add_tokens(list(tokens))
            if len(pipeline.tokenizer) > len(table):
                encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            for token, (vector, _) in tokens.items():
                table[pipeline.tokenizer.convert_tokens_to_ids(token)] = vector.to(table.device, table.dtype)
    pipeline.unet._applied_concept = applied
    return applied


_Owned = dict[str, tuple[Tensor, Concept]]


def _combine(concepts: Sequence[Concept]) -> tuple[_Owned, _Owned]:
    attention: _Owned = {}
    tokens: _Owned = {}
    for concept in concepts:
        for token, vector in concept.tokens.items():
            if token in tokens:
                raise UserError(f"{token!r} is a token of {tokens[token][1].source!r} and of {concept.source!r}")
            tokens[token] = (vector, concept)
        for key, weight in (concept.attention | concept.differences).items():
            if key in attention and not torch.equal(attention[key][0].float(), weight.float()):
                raise UserError(
                    f"{attention[key][1].source!r} and {concept.source!r} each trained their own attention weights; "
                    "one UNet can hold one set: merge them with merge.py, or train them together with --concepts_list"
                )
            attention.setdefault(key, (weight, concept))
    return attention, tokens


def _find_parameter(unet: nn.Module, key: str, concept: Concept) -> nn.Parameter:
    path, parameter = formats.parameter_name(key).rsplit(".", 1)
    try:
        module = unet.get_submodule(path)
        # A LoRA that was loaded before wraps the projection; the concept belongs into what it wraps.
        found = getattr(getattr(module, "base_layer", module), parameter)
    except AttributeError:
        raise UserError(f"{_trained_on(concept)}; this pipeline's UNet has no {path}") from None
    if found.is_meta:
        raise UserError("apply the concept before enabling offloading: the UNet's weights are not in memory")
    return found


def _check_fit(key: str, weight: Tensor, parameter: nn.Parameter, concept: Concept, pipeline: Any) -> None:
    if weight.shape != parameter.shape:
        here = getattr(pipeline, "name_or_path", None) or "this pipeline's model"
        raise UserError(
            f"{_trained_on(concept)}, with {key.split('.processor.')[1]} of shape {tuple(weight.shape)}; "
            f"{here!r} wants {tuple(parameter.shape)}: load the base model that the concept was trained on"
        )


def check_new_tokens(tokens: Mapping[str, tuple[Tensor, Concept]], tokenizer: Any, encoder: nn.Module) -> None:
    """Make sure that tokenizer and text encoder can take new words.

    Args:
        tokens: each with its embedding, (width,), and the concept that it is of.

    Raises:
        UserError: for a token that the vocabulary has already, or of another width.
    """
    vocabulary, width = tokenizer.get_vocab(), encoder.get_input_embeddings().embedding_dim
    for token, (vector, concept) in tokens.items():
        if token in vocabulary:
            raise UserError(f"the token {token!r} of {concept.source!r} is in the tokenizer's vocabulary already")
        if vector.shape != (width,):
            raise UserError(
                f"{_trained_on(concept)}, with {token!r} of shape {tuple(vector.shape)}; the text encoder here wants "
                f"{(width,)}: load the base model that the concept was trained on"
            )


def _trained_on(concept: Concept) -> str:
    return f"{concept.source!r} was trained on {concept.base_model or 'an unnamed base model'!r}"


# --- the model card ------------------------------------------------------------------------------


def model_card(
    concept: Concept,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    sample_prompt: str | None = None,
    sample_images: Sequence[str] = (),
    origin: str = "trained",
) -> str:
    """The text of ``README.md``: base model, tokens, prompts, licence, how to load, sample images.

    Args:
        concept: its ``base_model`` is named where there is one.
        prompts: the instance prompts of the training run.
        settings: what to tell about the run, for a table; must hold no secret.
        sample_prompt, sample_images: prompt and file names (beside the card) of images to show.
        origin: how the weights were made, ``trained`` or ``merged``.
    """
    words = ", ".join(f"`{token}`" for token in concept.tokens) or "no new word"
    prompt = sample_prompt or prompts[0]
    load_tokens = "".join(
        f'pipeline.load_textual_inversion(model, weight_name="{token}.bin")\n' for token in concept.tokens
    )
    text = f"""# Custom Diffusion: {words}

Cross-attention weights and new words for {concept.base_model or "a Stable Diffusion model that is not public"},
{origin} with [Custom Diffusion](https://www.cs.cmu.edu/~custom-diffusion/), for:

{_lines(f"- `{prompt}`" for prompt in prompts)}

{_lines(f"![{sample_prompt}](./{name})" for name in sample_images)}

## Use it

With the project that made it, in its folder; the path of this one, or its name on the Hub, for `this-folder`:

```bash
python infer.py --model_dir this-folder --prompt "{prompt}"
```

With diffusers alone (`load_attn_procs` silently loads nothing unless it is given `_pipeline`):

```python
import torch
from diffusers import DiffusionPipeline

model = "."  # the path of this folder, or its name on the Hub
base_model = "{concept.base_model or "the model above"}"
pipeline = DiffusionPipeline.from_pretrained(base_model, dtype=torch.float16).to("cuda")
pipeline.unet.load_attn_procs(model, weight_name="{WEIGHTS_STEM}.bin", _pipeline=pipeline)
{load_tokens}image = pipeline("{prompt}", num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]
```

## How it was {origin}

| setting | value |
|---|---|
{_lines(f"| {name} | {value} |" for name, value in settings.items())}

The licence of the base model holds for these weights too.
"""
    data = ModelCardData(
        base_model=concept.base_model,
        # Which licence that is depends on the base model; the Hub wants a name for what is on none of its lists.
        license="other",
        license_name="as-the-base-model",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "stable-diffusion", "custom-diffusion", "diffusers-training"],
        instance_prompt=", ".join(prompts),
        # What the Hub's page shows and lets visitors try.
        widget=[{"text": prompt, "output": {"url": name}} for name in sample_images] or [{"text": prompt}],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)
