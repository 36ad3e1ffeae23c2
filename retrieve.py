"""Bring real class images with their captions: ``python retrieve.py --class_prompt cat``.

Prior preservation on real images gives Custom Diffusion's best results. Candidates come from a source, are
fetched, checked and kept by the modules of retrieval/; here is what the user says, and what is done with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Pillow gives the memory of every image back to the system and takes it anew; keeping some of it is twice as fast.
os.environ.setdefault("PILLOW_BLOCKS_MAX", "8")

from PIL import Image
from tqdm.auto import tqdm

from config import CONFIG_NAME, HelpFormatter, config_text, parse_with_config, save_config, switch
from images import UserError
from retrieval.class_folder import ClassFolder, CheckedImage, check_image
from retrieval.download import Downloader, Refused
from retrieval.sources import (
    OPENVERSE_URL,
    WIKIMEDIA_URL,
    Candidate,
    ClipRetrieval,
    HubDataset,
    LocalFiles,
    Openverse,
    Several,
    Source,
    SourceError,
    WikimediaCommons,
    one_line,
)

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


# --- arguments -----------------------------------------------------------------------------------


def whole_number(least: int) -> Any:
    """An argparse type: a whole number of at least ``least``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    parse.__name__ = "whole number"
    return parse


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


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

Interrupted, the same command goes on where it stopped. Delete the images that you do not like (contact_sheet.jpg
shows all of them) and run it again: others take their places. OPENVERSE_URL and WIKIMEDIA_URL in the environment name
other addresses for the two public services, such as a proxy of your institution.
"""


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Bring real images of a class, with captions, for training with --real_prior.",
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
    add("--aesthetic_weight", type=float, default=0.1,
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

    add = parser.add_argument_group("downloads").add_argument
    add("--connections", type=whole_number(1), default=64, help="Downloads side by side.")
    add("--timeout", type=positive_number, default=30.0, help="Seconds that one image may take, retries included.")
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


def read_classes(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Class prompts and their folders, each pair once.

    Raises:
        UserError: for a list that is missing, broken or incomplete, and for two classes in one folder.
    """
    entries = [{"class_prompt": args.class_prompt, "class_data_dir": args.class_data_dir}]
    if args.concepts_list is not None:
        try:
            entries = json.loads(Path(args.concepts_list).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--concepts_list {args.concepts_list!r} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"--concepts_list {args.concepts_list!r} is no valid JSON: {error}") from error
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{args.concepts_list} must hold a list of concepts, each an object with class_prompt")
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


# --- sources -------------------------------------------------------------------------------------


def make_source(args: argparse.Namespace) -> Source:
    """The source that the user asks for.

    Raises:
        UserError: where it cannot be one.
    """
    agent = user_agent(args.contact)
    public = {
        "openverse": (Openverse, args.url or os.environ.get("OPENVERSE_URL") or OPENVERSE_URL),
        "wikimedia": (WikimediaCommons, args.url or os.environ.get("WIKIMEDIA_URL") or WIKIMEDIA_URL),
    }
    if args.source is None:
        return Several([kind(agent, url, args.min_size) for kind, url in public.values()], warn)
    if args.source in public:
        kind, url = public[args.source]
        return kind(agent, url, args.min_size)
    if args.source == "clip-retrieval":
        return ClipRetrieval(
            args.url,
            agent,
            args.indice_name,
            args.modality,
            args.aesthetic_score,
            args.aesthetic_weight,
            args.deduplicate,
        )
    if args.source == "local":
        return LocalFiles(args.path, args.words, int(args.max_megabytes * 2**20))
    return HubDataset(args.path, args.words, args.split, args.config_name, args.image_column, args.caption_column)


def user_agent(contact: str) -> str:
    """Who asks, as services want to know."""
    return f"custom-diffusion-retrieve/1.0 (class images for fine-tuning{'; ' * bool(contact)}{contact})"


def warn(message: str) -> None:
    """Say something beside the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


# --- filling it ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run has left out and why, what went wrong with the source, if anything, and whether it kept an image."""

    left_out: Counter[str] = field(default_factory=Counter)
    trouble: str | None = None
    has_kept: bool = False


def fill(folder: ClassFolder, source: Source, args: argparse.Namespace) -> Outcome:
    """Take candidates into the folder, in the order in which the source ranks them, until it has enough.

    Images are fetched and decoded side by side, but taken in order: the result does not depend on which server was
    quick, nor on interruptions.
    """
    outcome = Outcome()
    source.left_out = outcome.left_out
    downloader = Downloader(
        user_agent(args.contact),
        args.timeout,
        int(args.max_megabytes * 2**20),
        [*source.hosts, *args.private_host],
        source.per_host,
    )

    def prepare(candidate: Candidate) -> CheckedImage:
        data = downloader.fetch(candidate.address) if candidate.image is None else candidate.image
        return check_image(data, args.min_size, args.max_size, args.max_megapixels * 1e6)

    have = len(folder.kept())
    candidates = _unknown(source.candidates(folder.class_prompt, args.num_class_images), folder, outcome)
    first = next(candidates, None)
    if first is None:
        return outcome
    pool = ThreadPoolExecutor(args.connections)
    # A thread of its own: Ctrl-C interrupts the main thread only, never an image that is half kept.
    keeper = ThreadPoolExecutor(1)
    # miniters=0: what is left out is shown too, though it is no step ahead.
    bar = tqdm(total=args.num_class_images, initial=have, desc=folder.class_prompt, unit="image", miniters=0)

    def ahead() -> int:
        # Not all that could be needed at once: near the end that would be downloads for nothing.
        return min(2 * args.connections, 2 * (args.num_class_images - have) + 4)

    try:
        for candidate, future in _in_order(itertools.chain([first], candidates), prepare, pool, ahead):
            taken = keeper.submit(_take, candidate, future, folder, args, outcome).result()
            have += taken
            bar.set_postfix_str(summary(outcome.left_out, 3), refresh=False)
            bar.update(taken)
            if have >= args.num_class_images:
                break
    finally:
        downloader.stop()
        pool.shutdown(cancel_futures=True)
        keeper.shutdown()
        bar.close()
    return outcome


def _in_order(
    candidates: Iterator[Candidate],
    prepare: Callable[[Candidate], CheckedImage],
    pool: ThreadPoolExecutor,
    ahead: Callable[[], int],
) -> Iterator[tuple[Candidate, Future[CheckedImage]]]:
    """Every candidate with its (coming) image, in order; up to ``ahead()`` of them are under way meanwhile."""
    pending: deque[tuple[Candidate, Future[CheckedImage]]] = deque()
    while True:
        is_ready = bool(pending) and pending[0][1].done()
        if not is_ready and len(pending) < ahead() and (candidate := next(candidates, None)) is not None:
            pending.append((candidate, pool.submit(prepare, candidate)))
        elif pending:
            yield pending.popleft()
        else:
            return


def _unknown(candidates: Iterator[Candidate], folder: ClassFolder, outcome: Outcome) -> Iterator[Candidate]:
    """Candidates of origins that were not seen before; an error of the source is kept for the end."""
    taken, seen = {record["url"] for record in folder.records}, set()
    try:
        for candidate in candidates:
            origin = one_line(candidate.origin)
            if origin in seen:
                outcome.left_out["the same address again"] += 1
            elif origin not in taken:
                seen.add(origin)
                yield candidate
    except SourceError as error:
        outcome.trouble = str(error)


def _take(
    candidate: Candidate, future: Future[CheckedImage], folder: ClassFolder, args: argparse.Namespace, outcome: Outcome
) -> bool:
    try:
        image = future.result()
    except Refused as refusal:
        outcome.left_out[str(refusal)] += 1
        return False
    if folder.has_near_duplicate(image):
        outcome.left_out["near-duplicate"] += 1
        return False
    folder.add(image, candidate)
    if not outcome.has_kept:
        # With the first image: a run that is killed later has said what it was, and one that finds none leaves nothing.
        save_config(args, folder.path / CONFIG_NAME)
        outcome.has_kept = True
    return True


# --- reporting -----------------------------------------------------------------------------------


def summary(left_out: Counter[str], most: int | None = None) -> str:
    """The reasons on one line, commonest first."""
    return ", ".join(f"{number} {reason}" for reason, number in left_out.most_common(most) if number)


def table(left_out: Counter[str]) -> str:
    """The reasons as a small table, commonest first."""
    rows = [f"{number:>8}  {reason}" for reason, number in left_out.most_common() if number]
    return "\n".join(["left out  reason", *rows])


def retrieve(class_prompt: str, path: Path, source: Source, args: argparse.Namespace) -> str | None:
    """Fill the folder of one class, and say what was done.

    Returns:
        What went wrong, on one line; None where there are as many images as asked for.

    Raises:
        UserError: where the folder cannot be used.
    """
    folder = ClassFolder(path, class_prompt)
    try:
        config = path / CONFIG_NAME
        if not folder.records and config.exists() and config.read_bytes() != config_text(args):
            raise UserError(
                f"{str(config)!r} would be replaced by the configuration of this run: move it, or give another "
                "--class_data_dir"
            )
        wanted, had = args.num_class_images, len(folder.kept())
        if had >= wanted:
            folder.write_lists()
            print(f"finished already: {had} images of {class_prompt!r} in {path}, {wanted} asked for; nothing to do")
            return None
        print(f"{class_prompt!r}: {had} of {wanted} images are in {path}" if had else f"{class_prompt!r} into {path}")
        try:
            outcome = fill(folder, source, args)
        finally:
            # Also what an interrupted run leaves behind can be trained on.
            if folder.kept():
                folder.write_lists()
        return _report(folder, outcome, wanted)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written to: {error.strerror or error}") from error
    finally:
        folder.close()


def _report(folder: ClassFolder, outcome: Outcome, wanted: int) -> str | None:
    have = len(folder.kept())
    if have:
        left_out = f" (left out: {summary(outcome.left_out)})" if outcome.left_out and have >= wanted else ""
        print(f"{have} images in {folder.path}{left_out}{_glance(folder)}")
    if have >= wanted:
        return None
    if outcome.left_out:
        print(table(outcome.left_out))
    if have == 0 and outcome.trouble:
        return outcome.trouble
    found = f"{have} of the {wanted} images of {folder.class_prompt!r} found"
    if outcome.trouble:
        return f"{found}, then {outcome.trouble}; the same command goes on from there"
    return f"{found}, and there are no more: ask another --source, or lower --num_class_images or --min_size"


def _glance(folder: ClassFolder) -> str:
    try:
        return f", all at a glance: {folder.write_contact_sheet()}"
    except (OSError, ValueError, SyntaxError) as error:  # a file that somebody has put in the place of an image
        warn(f"no contact sheet: {one_line(str(error))}")
        return ""


def main(argv: Sequence[str] | None = None) -> None:
    """Bring the images of every class; exits non-zero where a class has too few."""
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
    try:
        main()
    except (UserError, SourceError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was found is kept, and the same command goes on from there")
