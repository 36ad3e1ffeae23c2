"""Which concepts there are: from a JSON file, or from the flags of a single one."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from custom_diffusion.data.class_image_folders import ClassImageFolder, check_class_folders
from custom_diffusion.data.hub_datasets import dataset_folder
from custom_diffusion.errors import UserError
from custom_diffusion.files import is_hub_id, read_text
from custom_diffusion.text import one_line


@dataclass(frozen=True)
class ConceptEntry:
    """One concept of a list, as the user typed it.

    Attributes:
        instance_prompt: names the concept, such as "photo of a <new1> cat".
        instance_data_dir: folder of its images, or a dataset of the Hub.
        class_prompt: such as "cat".
        class_data_dir: folder of the class images.
        validation_data_dir: folder of images to validate with; empty where there are none.
        instance_folder: where the instance images are: ``instance_data_dir``, or the local copy of a dataset.
    """

    instance_prompt: str = ""
    instance_data_dir: str = ""
    class_prompt: str = ""
    class_data_dir: str = ""
    validation_data_dir: str = ""
    instance_folder: Path = Path()

    @property
    def class_folder(self) -> ClassImageFolder:
        """The folder of the class images."""
        return ClassImageFolder(Path(self.class_data_dir), self.class_prompt)


NEEDED = ("instance_prompt", "instance_data_dir")
NEEDED_FOR_PRIOR = (*NEEDED, "class_prompt", "class_data_dir")


def read_list(path: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of ``--concepts_list`` as they are.

    Raises:
        UserError: for a file that cannot be read, or is no list of objects.
    """
    try:
        entries = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"--concepts_list {path!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # broken JSON and text that is not UTF-8
        raise UserError(f"--concepts_list {path!r} is no valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must hold a list of concepts, each an object with {', '.join(needed)}")
    return entries


def read_concepts(args: argparse.Namespace) -> list[ConceptEntry]:
    """The concepts to learn, from ``--concepts_list`` or from the flags of a single one.

    Class prompts and folders are read with prior preservation only; class prompts also where ``--token_gate`` has a use
    for them.

    Raises:
        UserError: for a list that is missing, broken or incomplete, for folders of instance and validation images that
            are not there, and for folders of generated class images that hold another class.
    """
    needed = NEEDED_FOR_PRIOR if args.with_prior_preservation else NEEDED
    if args.concepts_list is None:
        entries = [{key: getattr(args, key) for key in (*NEEDED_FOR_PRIOR, "validation_data_dir")}]
    else:
        entries = read_list(args.concepts_list, needed)
    concepts = []
    for number, entry in enumerate(entries, 1):
        for key in needed:
            if not isinstance(entry.get(key), str) or not entry[key]:
                where = f"{args.concepts_list}: concept {number} has no text for {key!r}"
                raise UserError(f"--{key} is empty" if args.concepts_list is None else where)
            if not entry[key].isprintable():
                raise UserError(f"{key} {entry[key]!r} holds line breaks or unprintable characters")
        concept = ConceptEntry(**{key: entry[key] for key in needed}, validation_data_dir=_validation_folder(entry))
        class_prompt = entry.get("class_prompt")
        if getattr(args, "token_gate", False) and isinstance(class_prompt, str):
            concept = replace(concept, class_prompt=class_prompt)
        concepts.append(replace(concept, instance_folder=_instance_folder(concept.instance_data_dir)))
    _check_apart(concepts, getattr(args, "output_dir", None))
    if args.with_prior_preservation and not args.real_prior:
        check_class_folders([concept.class_folder for concept in concepts])
    return concepts


def _check_apart(concepts: Sequence[ConceptEntry], output_dir: str | None) -> None:
    """Refuse an output folder that holds the images: files of the same names would be replaced."""
    for concept in concepts:
        for folder in (concept.instance_folder, concept.validation_data_dir, concept.class_data_dir):
            if output_dir and folder and Path(folder).resolve() == Path(output_dir).resolve():
                raise UserError(f"--output_dir {output_dir!r} is a folder of images too: give another --output_dir")


def _validation_folder(entry: dict[str, Any]) -> str:
    name = entry.get("validation_data_dir") or ""
    if name and not (isinstance(name, str) and Path(name).is_dir()):
        raise UserError(f"there is no folder {name!r} (validation_data_dir)")
    return name


def _instance_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name.split("@")[0]):
        raise UserError(f"there is no folder {name!r} (instance_data_dir)")
    return dataset_folder(name, Path(HF_HOME, "custom-diffusion"))


def read_classes(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Class prompts and their folders, each pair once, for retrieval.

    Raises:
        UserError: for a list that is missing, broken or incomplete, and for two classes in one folder.
    """
    entries = [{"class_prompt": args.class_prompt, "class_data_dir": args.class_data_dir}]
    if args.concepts_list is not None:
        entries = read_list(args.concepts_list, ["class_prompt"])
    classes: dict[Path, str] = {}
    for number, entry in enumerate(entries, 1):
        prompt, name = entry.get("class_prompt"), entry.get("class_data_dir")
        if not isinstance(prompt, str) or not one_line(prompt):
            where = f"{args.concepts_list}, concept {number}: class_prompt" if args.concepts_list else "--class_prompt"
            raise UserError(f"{where} has no text to search for")
        prompt = one_line(prompt)
        if name is not None and (not isinstance(name, str) or not name or one_line(name) != name):
            raise UserError(f"{name!r} is no name of a folder (class_data_dir)")
        folder = Path(name) if name else default_folder(prompt)
        if classes.setdefault(folder, prompt) != prompt:
            raise UserError(f"{str(folder)!r} would get two classes, {classes[folder]!r} and {prompt!r}")
    return [(prompt, folder) for folder, prompt in classes.items()]


def default_folder(class_prompt: str) -> Path:
    """Where the images of a class go: ``real_reg/samples_wooden_pot`` for "wooden pot".

    Raises:
        UserError: for a prompt without a letter or digit.
    """
    name = "_".join(re.findall(r"\w+", class_prompt))[:100]
    if not name:
        raise UserError(f"--class_prompt {class_prompt!r} makes no name for a folder: give --class_data_dir")
    return Path("real_reg") / f"samples_{name}"
