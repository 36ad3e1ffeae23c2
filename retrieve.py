"""Get real class images with their captions: ``python retrieve.py --class_prompt cat``.

Prior preservation on real images gives Custom Diffusion's best results. Candidates come from a source, are fetched,
checked and kept by the modules of custom_diffusion/retrieval; here is what the user says, and what is done with it.
"""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from collections.abc import Sequence

from PIL import Image

from custom_diffusion.command_line import (
    HelpFormatter,
    finite_number,
    number_from_zero,
    parse_with_config,
    positive_number,
    run,
    switch,
    whole_number,
)
from custom_diffusion.data.concept_list import read_classes
from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.clip_retrieval import ClipRetrieval
from custom_diffusion.retrieval.filling import retrieve, user_agent
from custom_diffusion.retrieval.host_limits import HostLimits
from custom_diffusion.retrieval.hub_dataset import HubDataset
from custom_diffusion.retrieval.local_files import LocalFiles
from custom_diffusion.retrieval.public import OPENVERSE_URL, WIKIMEDIA_URL, Openverse, WikimediaCommons
from custom_diffusion.retrieval.sources import Several, Source

# Pillow gives the memory of every image back to the system and asks for it again; keeping some of it is twice as fast.
os.environ.setdefault("PILLOW_BLOCKS_MAX", "8")

SOURCES = ("openverse", "wikimedia", "clip-retrieval", "local", "dataset")

# Flags that mean something to some sources only: elsewhere they would be ignored in silence.
FLAGS_OF_SOURCES = {
    "url": ("clip-retrieval", "openverse", "wikimedia"),
    "indice_name": ("clip-retrieval",),
    "modality": ("clip-retrieval",),
    "aesthetic_score": ("clip-retrieval",),
    "aesthetic_weight": ("clip-retrieval",),
    "deduplicate": ("clip-retrieval",),
    "path": ("local", "dataset"),
    "words": ("local", "dataset"),
    "split": ("dataset",),
    "config_name": ("dataset",),
    "image_column": ("dataset",),
    "caption_column": ("dataset",),
}

EPILOG = """examples:
  200 openly licensed photographs of cats from the web, into real_reg/samples_cat:
    python retrieve.py --class_prompt cat
  as many as the concepts of a training run want, one folder for each class:
    python retrieve.py --concepts_list concept_list.json
  from your own clip-retrieval server (docs/retrieval.md says how to set one up):
    python retrieve.py --class_prompt cat --url http://localhost:1234
  from images that you have, a folder or a tar, searched by the words of their captions:
    python retrieve.py --class_prompt cat --path my_images
  from a dataset of the Hugging Face Hub:
    python retrieve.py --class_prompt cat --source dataset --path user/dataset

After an interruption, the same command continues where it stopped. Delete the images that you do not like
(contact_sheet.jpg shows all of them) and run it again: others take their places. OPENVERSE_URL and WIKIMEDIA_URL in the
environment name other addresses for the two public services, such as a proxy of your institution.
"""


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Get real images of a class, with captions, for training with --real_prior.",
        usage="%(prog)s --class_prompt cat [--class_data_dir FOLDER] [--num_class_images 200] [more options: --help]",
        epilog=EPILOG,
        formatter_class=type("Formatter", (HelpFormatter, argparse.RawDescriptionHelpFormatter), {}),
        allow_abbrev=False,
    )
    add = parser.add_argument_group("classes").add_argument
    add("--class_prompt", help="What to look for, such as 'cat' or 'wooden pot'.")
    add("--class_data_dir", help="Folder for the images; if not given, real_reg/samples_ and the class prompt.")
    add("--num_class_images", type=whole_number(1), default=200, help="How many images each class gets.")
    add("--concepts_list", help="JSON file as training takes it: a list of {class_prompt, class_data_dir}, "
        "other entries are ignored. Replaces the flags of these names.")

    add = parser.add_argument_group("where from").add_argument
    add("--source", choices=SOURCES, help="Where to look. If not given: clip-retrieval with --url, local with --path, "
        "and otherwise Openverse and then Wikimedia Commons.")
    add("--url", help="Address of the clip-retrieval service (or another one of --source openverse or wikimedia).")
    add("--indice_name", help="Which index of the service; if not given, its first.")
    add("--modality", choices=["image", "text"], default="image",
        help="What the prompt is compared with: the service's images or their captions.")
    add("--aesthetic_weight", type=finite_number, default=0.1,
        help="How much images that people like are preferred, where the service can.")
    add("--aesthetic_score", type=int, choices=range(10), default=9, metavar="0-9", help="What score is preferred.")
    add("--deduplicate", type=switch, default=True, metavar="True|False",
        help="Let the service leave out near-duplicates.")
    add("--path", help="Folder of images or tar (--source local), or name of a dataset (--source dataset).")
    add("--words", help="Words that a caption must hold; if not given, those of the class prompt; '' takes all.")
    add("--split", default="train", help="Split of the dataset.")
    add("--config_name", help="Configuration of the dataset, where it has several.")
    add("--image_column", help="Column with the images or their addresses, where it is not found by itself.")
    add("--caption_column", help="Column with the captions, where it is not found by itself.")

    add = parser.add_argument_group("which images").add_argument
    add("--min_size", type=whole_number(1), default=256, help="Shortest side in pixels that an image must have.")
    add("--max_size", type=whole_number(0), default=1024,
        help="Images with a longer shortest side are made smaller; 0 keeps them. Training reads each many times.")
    add("--near_duplicate_tolerance", type=number_from_zero, default=1.0,
        help="How much near-duplicates may differ, of which only the first is kept: 1 is what saving again, resizing "
        "and cropping by 3 %% change; more leaves out images that are less alike, and 0 exact copies only.")

    add = parser.add_argument_group("downloads").add_argument
    add("--connections", type=whole_number(1), default=64, help="Downloads side by side.")
    add("--timeout", type=positive_number, default=30.0, help="Seconds that one image may take, retries included. "
        "Images of a host that asks for a longer pause are left for later.")
    add("--max_megabytes", type=positive_number, default=20.0, help="Longer files are left out.")
    add("--max_megapixels", type=positive_number, default=50.0, help="Larger images are left out.")
    add("--private_host", action="append", default=[], metavar="HOST",
        help="Host inside your network that images may come from; can be given several times. Besides these, only "
        "public addresses are asked, and the host of --url itself.")
    add("--contact", default="", help="Your e-mail address or page, told to the services in the user agent, as "
        "Wikimedia asks for.")
    return parser


# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``source`` is None where the public sources are to be asked.

    Raises:
        SystemExit: as argparse does, after a usage line and one line that names what is wrong.
    """
    parser = build_parser()
    args = parse_with_config(parser, argv)
    if (args.concepts_list is None) == (args.class_prompt is None):
        parser.error("give either --class_prompt, such as --class_prompt cat, or --concepts_list")
    if args.concepts_list is not None and args.class_data_dir is not None:
        parser.error("--class_data_dir goes with --class_prompt; with --concepts_list the folders are in the list")
    if args.url is not None and args.path is not None:
        parser.error("--url and --path are two different sources: give one of them")
    if args.source is None and args.url is not None:
        args.source = "clip-retrieval"
    if args.source is None and args.path is not None:
        args.source = "local"
    if args.source == "clip-retrieval" and args.url is None:
        parser.error("--source clip-retrieval needs the --url of a service, such as http://localhost:1234")
    if args.source in ("local", "dataset") and args.path is None:
        parser.error(f"--source {args.source} needs a --path")
    for flag, sources in FLAGS_OF_SOURCES.items():
        if getattr(args, flag) != parser.get_default(flag) and args.source not in sources:
            parser.error(f"--{flag} means something only to --source {' or '.join(sources)}")
    if any(not letter.isprintable() or not letter.isascii() for letter in args.contact):
        parser.error("--contact goes into a header: plain ASCII only")
    if args.max_size and args.max_size < args.min_size:
        parser.error(f"--max_size {args.max_size} is less than --min_size {args.min_size}")
    return args


def make_source(args: argparse.Namespace) -> Source:
    """The source that the user asks for.

    Raises:
        UserError: where it cannot be one.
    """
    limits = HostLimits()
    sources = ("openverse", "wikimedia") if args.source is None else (args.source,)
    return Several([one_source(name, args, limits) for name in sources], limits)


def one_source(name: str, args: argparse.Namespace, limits: HostLimits) -> Source:
    """The source of one name in :data:`SOURCES`."""
    agent = user_agent(args.contact)
    if name == "openverse":
        url = args.url or os.environ.get("OPENVERSE_URL") or OPENVERSE_URL
        return Openverse(agent, url, args.min_size, limits)
    if name == "wikimedia":
        url = args.url or os.environ.get("WIKIMEDIA_URL") or WIKIMEDIA_URL
        return WikimediaCommons(agent, url, args.min_size, limits, bool(args.contact))
    if name == "clip-retrieval":
        return ClipRetrieval(
            args.url,
            agent,
            args.indice_name,
            args.modality,
            args.aesthetic_score,
            args.aesthetic_weight,
            args.deduplicate,
            limits,
        )
    if name == "local":
        return LocalFiles(args.path, args.words, int(args.max_megabytes * 2**20))
    return HubDataset(args.path, args.words, args.split, args.config_name, args.image_column, args.caption_column)


def main(argv: Sequence[str] | None = None) -> None:
    """Get the images of every class; exits non-zero where a class has too few."""
    args = parse_args(argv)
    # Batch systems end a job this way: what was found by then should be in the lists.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    classes = read_classes(args)
    source = make_source(args)
    why = " (neither --source nor --url nor --path given, so the public ones)" if args.source is None else ""
    print(f"source: {source.describe()}{why}", flush=True)
    problems = [problem for prompt, path in classes if (problem := retrieve(prompt, path, source, args))]
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))


if __name__ == "__main__":
    run(main, interrupted="interrupted: what was found is kept, and the same command continues from there")
