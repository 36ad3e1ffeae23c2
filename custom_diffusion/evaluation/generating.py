"""The images that are evaluated: made where they are missing, so that an interrupted evaluation continues."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from custom_diffusion.command_line import given_base_model
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.files import Concept, find_base_model
from custom_diffusion.errors import UserError
from custom_diffusion.evaluation.layouts import GeneratedImage, metadata_of
from custom_diffusion.files import remove_half_written, write_bytes
from custom_diffusion.images import load_image, write_generated
from custom_diffusion.models.drawing import load_to_draw, put_on, usual_precision
from custom_diffusion.models.families import family_of, text_models_of
from custom_diffusion.models.vocabulary import embedding_table
from custom_diffusion.text import slug

# Flags that decide what an image looks like; they stand in its metadata.
SAMPLING = ("num_inference_steps", "guidance_scale", "eta", "scheduler")
# What earlier versions did not write into an image's metadata.
ADDED = ("dtype", "revision", "tokenizer", "vae")


@dataclass(frozen=True)
class Job:
    """An image to make: its prompt, and the seed of its noise."""

    prompt: str
    seed: int


def jobs_of(prompts: Sequence[str], num_images: int, seed: int) -> list[Job]:
    """``num_images`` of every prompt; image i starts from the noise of ``seed`` + i, as in infer.py."""
    return [Job(prompt, seed + number) for prompt in prompts for number in range(num_images)]


class Studio:
    """Makes images with the base model, with or without a concept.

    The base model is loaded when the first image is missing. A concept is applied to it and taken out again.

    Args:
        args: the flags of the base model, :data:`SAMPLING`, ``batch_size``, ``dtype``.
        concept: whose base model is used.
        device: such as ``cuda``.
    """

    def __init__(self, args: argparse.Namespace, concept: Concept, device: str) -> None:
        self.args = args
        self.device = device
        self.has_several_encoders = any(len(vectors) > 1 for vectors in concept.tokens.values())
        self.base_model = find_base_model(concepts=[concept], **given_base_model(args))

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The base model's pipeline on the device.

        Raises:
            UserError: where it cannot be loaded or put there.
        """
        # A black image in place of one that the safety checker dislikes would be scored like any other.
        pipeline = load_to_draw(self.base_model, self.args.scheduler, self.args.dtype, self.device)
        pipeline.set_progress_bar_config(disable=True)
        return put_on(pipeline, self.device)

    def sampling(self) -> dict[str, Any]:
        """What decides how an image looks, beside its prompt, its seed and the concept."""
        model = self.base_model
        return {
            **{name: getattr(self.args, name) for name in SAMPLING},
            "base_model": model.name,
            "dtype": self.args.dtype or usual_precision(self.device),
            **{"revision": model.revision, "tokenizer": model.tokenizer, "vae": model.other_vae},
            # Earlier versions took the first new word for the end of XL's prompts.
            **({"pooled": "at the end"} if self.has_several_encoders else {}),
        }

    def untrained(self, tokens: Sequence[str], initializers: Sequence[str]) -> Concept:
        """The control: the tokens as training starts them, and the base model's own attention.

        Args:
            initializers: entries of the vocabulary, one for each token, the last for all that are left.

        Raises:
            UserError: for one that is no entry.
        """
        tokenizers, encoders = text_models_of(family_of(self.pipeline.components, "the base model"), self.pipeline)
        vectors: dict[str, dict[str, Tensor]] = {token: {} for token in tokens}
        for name, tokenizer in tokenizers.items():
            vocabulary = tokenizer.get_vocab()
            for number, token in enumerate(tokens):
                word = initializers[min(number, len(initializers) - 1)]
                row = vocabulary.get(word, vocabulary.get(f"{word}</w>"))
                if row is None:
                    raise UserError(f"--initializer_token {word!r} is no entry of the vocabulary: take a common word")
                vectors[token][name] = embedding_table(encoders[name])[row].detach().clone()
        return Concept({}, vectors, source="the untrained word")

    def fill(self, folder: Path, jobs: Sequence[Job], concept: Concept | None, what: str) -> list[GeneratedImage]:
        """Make the images that a folder lacks.

        The folder has the layout of CustomConcept101, ``samples/`` and ``prompts.json``, and every image says in its
        metadata how it was made.

        Args:
            concept: None for the base model itself.
            what: the images are, for the progress bar and the metadata.

        Returns:
            All images, in the order of the jobs.

        Raises:
            UserError: where the folder holds images that were made otherwise, and as loading and applying do.
        """
        settings = self.sampling() | {"concept": digest_of_concept(concept)}
        samples = folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        remove_half_written(samples)
        paths = [
            samples / f"{number:05d}_{slug(job.prompt, otherwise='image')}_seed{job.seed}.png"
            for number, job in enumerate(jobs)
        ]
        _check_settings(samples, dict(zip(paths, jobs, strict=True)), settings)
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="image", desc=what) as progress:
            if missing:
                with self.showing(concept) as pipeline:
                    for start in range(0, len(missing), self.args.batch_size):
                        batch = missing[start : start + self.args.batch_size]
                        self._draw(pipeline, [jobs[number] for number in batch], [paths[n] for n in batch], settings)
                        progress.update(len(batch))
        prompts = {path.stem: job.prompt for path, job in zip(paths, jobs, strict=True)}
        write_bytes(folder / "prompts.json", json.dumps(prompts, indent=2, ensure_ascii=False).encode())
        return [GeneratedImage(path, job.prompt) for path, job in zip(paths, jobs, strict=True)]

    @contextmanager
    def showing(self, concept: Concept | None) -> Iterator[DiffusionPipeline]:
        """The pipeline with a concept in it, for a while."""
        applied = None if concept is None else apply_concepts(self.pipeline, concept)
        try:
            yield self.pipeline
        finally:
            if applied is not None:
                applied.remove()

    def _draw(self, pipeline: Any, jobs: Sequence[Job], paths: Sequence[Path], settings: Mapping[str, object]) -> None:
        images = pipeline(
            [job.prompt for job in jobs],
            num_inference_steps=self.args.num_inference_steps,
            guidance_scale=self.args.guidance_scale,
            eta=self.args.eta,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
        ).images
        for job, path, image in zip(jobs, paths, images, strict=True):
            write_generated(path, image, job.prompt, job.seed, settings)


def digest_of_concept(concept: Concept | None) -> str | None:
    """16 digits that other weights would change; None for the base model."""
    if concept is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(concept.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_settings(folder: Path, wanted: Mapping[Path, Job], settings: Mapping[str, object]) -> None:
    """Make sure that the images of a folder are those of this evaluation.

    Raises:
        UserError: where one is of other settings or prompts; it is named.
    """
    advice = "give another --output_dir, or remove that folder"
    for path in sorted(folder.glob("*.png")):
        if path not in wanted:
            raise UserError(f"{str(path)!r} is of an evaluation with other prompts or seeds: {advice}")
        try:
            load_image(path)
            metadata = metadata_of(path)
            others = json.loads(metadata.get("settings", "{}"))
        except (OSError, ValueError) as error:
            raise UserError(f"{str(path)!r} is damaged: remove it") from error
        if metadata.get("prompt") != wanted[path].prompt:
            # Its name has 60 letters and digits of the prompt.
            raise UserError(f"{str(path)!r} is of the prompt {metadata.get('prompt')!r}: {advice}")
        different = [
            name for name in settings if (name in others or name not in ADDED) and others.get(name) != settings[name]
        ]
        if different:
            name = different[0]
            raise UserError(
                f"{str(folder)!r} holds images made with {name} {others.get(name)!r} rather than {settings[name]!r}: "
                f"{advice}"
            )
