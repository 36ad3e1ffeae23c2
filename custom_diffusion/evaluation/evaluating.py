"""Evaluations from the command line to the result: of a concept, of images that are there, and of checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from custom_diffusion.concept.checkpoint_folders import list_checkpoints
from custom_diffusion.concept.files import WEIGHTS_STEM, Concept, load_concept
from custom_diffusion.concept.prompts import class_words
from custom_diffusion.errors import UserError
from custom_diffusion.evaluation.choosing import IMAGE, KID, SPREAD, TEXT, choose
from custom_diffusion.evaluation.generating import Studio, digest_of_concept, jobs_of
from custom_diffusion.evaluation.layouts import find_generated
from custom_diffusion.evaluation.measuring import (
    FeatureCache,
    Ruler,
    load_encoders,
    real_class_images,
    real_images,
    words_of,
)
from custom_diffusion.evaluation.prompts import fill_in, own_prompts, phrases_of, read_prompts
from custom_diffusion.evaluation.results import Evaluation, Measure
from custom_diffusion.files import output_folder
from custom_diffusion.models.drawing import best_device

FOLDER_NAME, CHECKPOINTS_NAME = "evaluation", "checkpoints"


def default_output_dir(args: argparse.Namespace) -> str:
    """Where an evaluation goes if nothing is said: into the folder of the concept, where that is one."""
    if args.images_dir is None and Path(args.model_dir).is_dir():
        own = Path(args.model_dir, FOLDER_NAME)
        return str(own / CHECKPOINTS_NAME if args.checkpoints else own)
    return FOLDER_NAME


@dataclass(frozen=True)
class Subject:
    """What a concept is called, and what it is compared with.

    Attributes:
        tokens: its modifier tokens.
        prompts: that its images are made from.
        classes: its class prompts, in the order of the tokens.
        targets: folders of its real images.
        real: for each class the real class images; none without ``--class_data_dir``.
    """

    tokens: list[str]
    prompts: list[str]
    classes: list[str]
    targets: list[Path]
    real: list[list[Path]]


def describe(args: argparse.Namespace, concept: Concept) -> Subject:
    """Read all that an evaluation of a concept needs, before anything slow begins.

    Raises:
        UserError: for prompts and folders that cannot be used, and classes that are not known.
    """
    tokens = list(concept.tokens)
    known = class_words(concept)
    given = words_of(args.class_prompt)
    if given and tokens and len(given) != len(tokens):
        raise UserError(f"--class_prompt has {len(given)} classes for {len(tokens)} tokens: join them with '+'")
    classes = given or [known[token] for token in tokens if token in known]
    phrases = phrases_of(tokens, dict(zip(tokens, given, strict=True)) if given and tokens else known) or classes
    if not phrases:
        raise UserError(f"{concept.source!r} has no new word, and its card no class: give --class_prompt")
    if args.class_data_dir and len(args.class_data_dir) != len(classes):
        raise UserError(
            f"--class_data_dir has {len(args.class_data_dir)} folders for {len(classes)} classes: "
            "give one for each, and the classes with --class_prompt"
        )
    lines = own_prompts(args.prompts) if args.prompts_file is None else read_prompts(args.prompts_file, classes)
    real = [real_class_images(Path(folder), args.kid_subset_size) for folder in args.class_data_dir]
    prompts = [fill_in(line, phrases) for line in lines]
    targets = [Path(folder) for folder in args.instance_data_dir]
    for folder in targets:
        real_images(folder)  # minutes of sampling should not come before the news that there are none
    return Subject(tokens, prompts, classes, targets, real)


def evaluate_concept(args: argparse.Namespace) -> Evaluation:
    """Make images of a concept, or take those that are there, and measure them beside their controls.

    Raises:
        UserError: for whatever of the flags cannot be used.
    """
    concept = load_concept(args.model_dir)
    subject = describe(args, concept)
    device = args.device or best_device()
    studio = Studio(args, concept, device)
    encoders = load_encoders(args, device)
    tokens = words_of(args.modifier_token) or subject.tokens
    ruler = Ruler(encoders, tokens, FeatureCache())
    folder, jobs = output_folder(args.output_dir), jobs_of(subject.prompts, args.num_images, args.seed)
    images = studio.fill(folder / "concept", jobs, concept, "images of the concept")
    control = []
    if not args.no_controls and subject.tokens:
        untrained = studio.untrained(subject.tokens, words_of(args.initializer_token))
        control = studio.fill(folder / "untrained", jobs, untrained, "with the untrained word")
    measures = ruler.text(images, control)
    measures += ruler.image(images, subject.targets, control)
    measures += measure_kid(args, studio, ruler, subject, concept, folder)
    return Evaluation(args.model_dir, measures, describe_facts(args, ruler, subject.prompts, len(images), studio))


def measure_kid(
    args: argparse.Namespace, studio: Studio, ruler: Ruler, subject: Subject, concept: Concept, folder: Path
) -> list[Measure]:
    """KID of the plain class prompts, with the concept and without it; nothing without real class images."""
    measures: list[Measure] = []
    for number, (name, real) in enumerate(zip(subject.classes, subject.real, strict=False)):
        jobs = jobs_of([name], args.num_class_images, args.seed)
        images = studio.fill(folder / f"class_{number}", jobs, concept, f"images of {name!r}")
        control = []
        if not args.no_controls:
            base = folder / f"class_{number}_base_model"
            control = studio.fill(base, jobs, None, f"{name!r} by the base model")
        measures += ruler.kid(name, images, real, control, args.kid_subset_size, args.kid_subsets)
    return measures


def evaluate_checkpoints(args: argparse.Namespace) -> Evaluation:
    """Measure every checkpoint of a run, and its result where that is none of them, and choose the best.

    Raises:
        UserError: where there is no checkpoint, and for whatever of the flags cannot be used.
    """
    concepts = find_checkpoints(Path(args.model_dir))
    first = next(iter(concepts.values()))
    subject = describe(args, first)
    device = args.device or best_device()
    studio, encoders = Studio(args, first, device), load_encoders(args, device)
    ruler = Ruler(encoders, words_of(args.modifier_token) or subject.tokens, FeatureCache())
    output, jobs = output_folder(args.output_dir), jobs_of(subject.prompts, args.num_images, args.seed)
    args.no_controls = True  # the checkpoints are compared with each other
    rows = []
    for name, concept in concepts.items():
        folder = output / name
        images = studio.fill(folder / "concept", jobs, concept, f"images of {name}")
        measures = ruler.text(images) + ruler.image(images, subject.targets)
        measures += measure_kid(args, studio, ruler, subject, concept, folder)
        rows.append({"checkpoint": name, **row_of(measures, encoders.all()[0].name)})
    facts = describe_facts(args, ruler, subject.prompts, len(jobs), studio)
    facts["compared by"] = encoders.all()[0].name
    return Evaluation(args.model_dir, [], facts, rows, choose(rows, args.margin))


def find_checkpoints(folder: Path) -> dict[str, Concept]:
    """The concepts of a run's checkpoints by name, oldest first, and ``result`` where it is none of them.

    Raises:
        UserError: where there is no checkpoint.
    """
    concepts = {path.name: load_concept(path) for path in list_checkpoints(folder)}
    if not concepts:
        raise UserError(
            f"there is no checkpoint in {str(folder)!r}: give the --output_dir of a training run, and train with a "
            "--checkpointing_steps below its length"
        )
    if any(folder.glob(f"{WEIGHTS_STEM}.*")):
        result = load_concept(folder)
        # Its weights may have been saved in fp16, those of checkpoints never are.
        saved = (one for concept in reversed(concepts.values()) for one in (concept, concept.to(torch.float16)))
        if digest_of_concept(result) not in map(digest_of_concept, saved):
            concepts["result"] = result
    return concepts


def row_of(measures: Sequence[Measure], encoder: str) -> dict[str, float]:
    """What the checkpoints are compared by: means of an encoder's measures over classes and folders of real images.

    The text alignment is that without the new word, which another embedding of the word does not change.
    """

    def mean(kind: str, name: str = "", attribute: str = "value") -> list[float]:
        found = [one for one in measures if one.kind == kind and one.encoder == encoder and name in one.name]
        values = [float(getattr(one, attribute)) for one in found]
        return [sum(values) / len(values)] if values else []

    columns = {
        TEXT: mean("text", "without the new word"),
        IMAGE: mean("image"),
        KID: mean("kid"),
        SPREAD: mean("kid", attribute="spread"),
    }
    return {name: value[0] for name, value in columns.items() if value}


def evaluate_images(args: argparse.Namespace) -> Evaluation:
    """Measure images that are there.

    Raises:
        UserError: where there are none, or their prompts or what to compare them with are not known.
    """
    images = find_generated(Path(args.images_dir))
    if not args.instance_data_dir and not all(image.targets for image in images):
        raise UserError("give the real images of the concept to compare with: --instance_data_dir data/cat")
    encoders = load_encoders(args, args.device or best_device())
    output_folder(args.output_dir)
    ruler = Ruler(encoders, words_of(args.modifier_token) or None, FeatureCache())
    measures = ruler.text(images) + ruler.image(images, [Path(folder) for folder in args.instance_data_dir])
    prompts = sorted({image.prompt for image in images})
    return Evaluation(args.images_dir, measures, describe_facts(args, ruler, prompts, len(images)))


def describe_facts(
    args: argparse.Namespace, ruler: Ruler, prompts: Sequence[str], count: int, studio: Studio | None = None
) -> dict[str, Any]:
    """All that the numbers depend on; ``studio`` has made the images, if they were made here."""
    facts: dict[str, Any] = {"images": count, "prompts": len(prompts)}
    if studio is not None:
        sampling = {name: value for name, value in studio.sampling().items() if value is not None}
        facts = {"base model": sampling.pop("base_model")} | facts
        facts["sampling"] = sampling | {"seed": args.seed, "num_images": args.num_images}
    facts["encoders"] = [encoder.name for encoder in ruler.encoders.all()]
    facts["text alignment"] = "CLIPScore, 2.5 x max(cosine, 0), as in CustomConcept101"
    facts["image alignment"] = "mean of all pairwise cosines with the real images"
    facts["all prompts"] = list(prompts)
    return facts
