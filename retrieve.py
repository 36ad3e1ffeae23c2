"""Bring real class images with their captions: ``python retrieve.py --class_prompt cat``.

Prior preservation on real images gives Custom Diffusion's best results. This file reads in this order: arguments,
sources, checking a picture, the folder of a class, filling it, reporting. Where candidates come from is in
sources.py, and how strangers' addresses are fetched in download.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Pillow gives the memory of every picture back to the system and takes it anew; keeping some of it is twice as fast.
os.environ.setdefault("PILLOW_BLOCKS_MAX", "8")

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from download import Downloader, Refused
from pictures import UsageError, contact_sheet, load_image, write_whole
from sources import (
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

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not kept apart
    fcntl = None

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
# What the web serves as pictures. Pillow reads much more, some of it by running other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


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


def switch(text: str) -> bool:
    """An argparse type for True and False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


EPILOG = """examples:
  200 openly licensed photographs of cats from the web, into real_reg/samples_cat:
    python retrieve.py --class_prompt cat
  as many as the concepts of a training run want, one folder for each class:
    python retrieve.py --concepts_list concept_list.json
  from your own clip-retrieval server (docs/retrieval.md says how to set one up):
    python retrieve.py --class_prompt cat --url http://localhost:1234
  from pictures that you have, a folder or a tar, searched by the words of their captions:
    python retrieve.py --class_prompt cat --path my_pictures
  from a dataset of the Hugging Face Hub:
    python retrieve.py --class_prompt cat --source dataset --path lambdalabs/naruto-blip-captions

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
        formatter_class=type("Formatter", (argparse.ArgumentDefaultsHelpFormatter,
                                           argparse.RawDescriptionHelpFormatter), {}),
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
    add("--path", help="Folder of pictures or tar (--source local), or name of a dataset (--source dataset).")
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
    args = parser.parse_args(argv)
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
        UsageError: for a list that is missing, broken or incomplete, and for two classes in one folder.
    """
    entries = [{"class_prompt": args.class_prompt, "class_data_dir": args.class_data_dir}]
    if args.concepts_list is not None:
        try:
            entries = json.loads(Path(args.concepts_list).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--concepts_list {args.concepts_list!r} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--concepts_list {args.concepts_list!r} is no valid JSON: {error}") from error
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise UsageError(f"{args.concepts_list} must hold a list of concepts, each an object with class_prompt")
    classes: dict[Path, str] = {}
    for number, entry in enumerate(entries, 1):
        prompt, name = entry.get("class_prompt"), entry.get("class_data_dir")
        if not isinstance(prompt, str) or not one_line(prompt):
            where = f"{args.concepts_list}: concept {number}" if args.concepts_list else "--class_prompt"
            raise UsageError(f"{where} has no text to search for")
        prompt = one_line(prompt)
        if name is not None and (not isinstance(name, str) or not name or one_line(name) != name):
            raise UsageError(f"{name!r} is no name of a folder (class_data_dir)")
        folder = Path(name) if name else default_folder(prompt)
        if classes.setdefault(folder, prompt) != prompt:
            raise UsageError(f"{str(folder)!r} would get two classes, {classes[folder]!r} and {prompt!r}")
    return [(prompt, folder) for folder, prompt in classes.items()]


def default_folder(class_prompt: str) -> Path:
    """Where the images of a class go: ``real_reg/samples_wooden_pot`` for "wooden pot".

    Raises:
        UsageError: for a prompt without a letter or digit.
    """
    name = "_".join(re.findall(r"\w+", class_prompt))[:100]
    if not name:
        raise UsageError(f"--class_prompt {class_prompt!r} makes no name for a folder: give --class_data_dir")
    return Path("real_reg") / f"samples_{name}"


# --- sources -------------------------------------------------------------------------------------


def make_source(args: argparse.Namespace) -> Source:
    """The source that the user asks for.

    Raises:
        UsageError: where it cannot be one.
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


# --- checking a picture --------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture that was decoded whole: its JPEG, and a fingerprint that near-duplicates share (almost)."""

    jpeg: bytes
    fingerprint: int


# Fingerprints have 256 bits. Saving again, resizing and slight crops change some 20 of them, and two photographs of
# one thing differ in 85 or more.
NEAR_DUPLICATE_BITS = 32
# Each decoded picture takes memory: as many at a time as there are cores is as fast as all at once.
_decoding = threading.Semaphore(os.cpu_count() or 1)


def check_picture(data: bytes, min_size: int, max_size: int, max_pixels: float) -> Picture:
    """Decode a picture whole, and make a JPEG of at most ``max_size`` pixels on the shorter side of it.

    A JPEG that is small enough stays as it is, byte for byte.

    Args:
        data: the encoded picture.
        min_size: pixels that the shorter side must have.
        max_size: pixels that the shorter side is reduced to; 0 for no reduction.
        max_pixels: pixels that the picture may have in all.

    Raises:
        Refused: with the reason.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as opened:
            width, height = opened.size
            is_jpeg = opened.format in ("JPEG", "MPO")
        if width * height > max_pixels:
            raise Refused("too many pixels")
        if min(width, height) < min_size:
            raise Refused("too small")
        with _decoding:
            image = load_image(io.BytesIO(data))
            reduction = max_size / min(width, height) if max_size else 1.0
            if reduction < 1:
                image = image.resize([max(1, round(side * reduction)) for side in image.size], Image.Resampling.LANCZOS)
            return Picture(data if is_jpeg and reduction >= 1 else _as_jpeg(image), fingerprint(image))
    except Refused:
        raise
    except UnidentifiedImageError as error:
        raise Refused("no picture") from error
    except Image.DecompressionBombError as error:
        raise Refused("too many pixels") from error
    except Exception as error:  # broken files make Pillow's decoders raise nearly anything
        raise Refused("broken picture") from error


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def fingerprint(image: Image.Image) -> int:
    """Difference hash of 256 bits: where brightness rises from left to right in a 17 x 16 version of the picture."""
    small = image.resize((8 * 17, 8 * 16), Image.Resampling.BOX, reducing_gap=2.0)
    # As floats: rounded to whole greys, even areas would give bits at random.
    pixels = np.asarray(small.convert("F").resize((17, 16), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


# --- the folder of a class -----------------------------------------------------------------------


class ClassFolder:
    """The images of one class: ``images/``, ``sources.jsonl``, and the lists that training reads.

    ``sources.jsonl`` has a line for every image with its origin, caption, licence and fingerprint. It is what a run
    that goes on starts from; ``caption.txt``, ``urls.txt`` and ``images.txt`` follow from it. An image is written
    under a hidden name first, then its line, and then it gets its name: whenever a run is killed, the next one knows
    what to finish.

    Args:
        path: the folder; made if it is not there.
        class_prompt: what the images show.

    Raises:
        UsageError: where the folder cannot be used, holds another class, or what no list names.
    """

    LISTS = ("caption.txt", "urls.txt", "images.txt")

    def __init__(self, path: Path, class_prompt: str) -> None:
        self.path = path
        self.class_prompt = class_prompt
        self.images_path = path / "images"
        self._made = [folder for folder in (self.images_path, path, *path.parents) if not folder.exists()]
        try:
            self.images_path.mkdir(parents=True, exist_ok=True)
            self._journal = (path / "sources.jsonl").open("a+b", buffering=0)
        except OSError as error:
            raise UsageError(f"{str(path)!r} cannot be written to: {error.strerror} (class_data_dir)") from error
        try:
            self._lock()
            self.records = self._read()
            self._finish_interrupted()
            if not self.records:
                self._adopt()
        except BaseException:
            self.close()
            raise

    # --- what is there ---------------------------------------------------------------------------

    def kept(self) -> list[dict[str, Any]]:
        """The records whose images are there: what a user has deleted stays known, so that it does not come back."""
        return [record for record in self.records if self._image(record).is_file()]

    def image_paths(self) -> list[Path]:
        """The images, in the order of the lists."""
        return [self._image(record) for record in self.kept()]

    def _image(self, record: dict[str, Any]) -> Path:
        return self.images_path / record["file"]

    def has_near_duplicate(self, picture: Picture) -> bool:
        """Whether an image like this one was taken before."""
        return any(
            (picture.fingerprint ^ int(record["fingerprint"], 16)).bit_count() <= NEAR_DUPLICATE_BITS
            for record in self.records
        )

    # --- writing ---------------------------------------------------------------------------------

    def add(self, picture: Picture, candidate: Candidate) -> None:
        """Take an image in."""
        record = {
            "file": f"{self._free_number()}.jpg",
            "caption": one_line(candidate.caption) or self.class_prompt,
            "url": one_line(candidate.origin),
            "class_prompt": self.class_prompt,
            "fingerprint": f"{picture.fingerprint:064x}",
        }
        hidden = self._hidden(record)
        with hidden.open("wb") as file:
            file.write(picture.jpeg)
            file.flush()
            os.fsync(file.fileno())
        self._journal.write(_as_line(record | candidate.credit))
        self.records.append(record)
        hidden.rename(self._image(record))

    def _hidden(self, record: dict[str, Any]) -> Path:
        return self.images_path / f".{record['file']}.part"

    def _free_number(self) -> int:
        number = 1 + max((int(record["file"].partition(".")[0]) for record in self.records), default=-1)
        while (self.images_path / f"{number}.jpg").exists():
            number += 1
        return number

    def write_lists(self) -> bool:
        """Bring the lists up to date; gives whether there was anything to do."""
        records = self.kept()
        lines = {
            "caption.txt": [record["caption"] for record in records],
            "urls.txt": [record["url"] for record in records],
            "images.txt": [self._image(record).as_posix() for record in records],
        }
        changed = False
        for name in self.LISTS:
            content = "".join(f"{line}\n" for line in lines[name]).encode()
            path = self.path / name
            if not path.is_file() or path.read_bytes() != content:
                write_whole(path, lambda file, content=content: file.write(content))
                changed = True
        return changed

    def write_contact_sheet(self, columns: int = 10, most: int = 400) -> Path:
        """All images (or the first ones of very many) small on one."""
        paths = self.image_paths()[:most]
        rows = [paths[start : start + columns] for start in range(0, len(paths), columns)]
        sheet = contact_sheet(rows, side=128)
        write_whole(self.path / "contact_sheet.jpg", lambda file: sheet.save(file, "JPEG", quality=90))
        return self.path / "contact_sheet.jpg"

    def close(self) -> None:
        """Let others use the folder; one that this run has made and left empty goes."""
        is_empty = self._journal.seek(0, os.SEEK_END) == 0
        if is_empty:
            (self.path / "sources.jsonl").unlink(missing_ok=True)
        self._journal.close()
        for folder in self._made if is_empty else ():
            try:
                folder.rmdir()
            except OSError:
                break

    # --- reading ---------------------------------------------------------------------------------

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run is filling {str(self.path)!r}: wait for it, or end it") from None
        except OSError:  # a file system without locks
            return

    def _read(self) -> list[dict[str, Any]]:
        self._journal.seek(0)
        content = self._journal.read()
        whole = content[: content.rfind(b"\n") + 1]
        if _is_json(content[len(whole) :]):
            # A text editor's last line.
            self._journal.write(b"\n")
            whole = content + b"\n"
        elif len(whole) < len(content):
            # What a killed run has not finished writing; its image still has its hidden name.
            self._journal.truncate(len(whole))
        records = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                is_whole = all(isinstance(record[name], str) for name in ("file", "caption", "url", "class_prompt"))
                int(record["fingerprint"], 16)
            except (ValueError, TypeError, KeyError, RecursionError):
                is_whole = False
            if not is_whole or not re.fullmatch(r"\d{1,9}\.\w{1,5}", record["file"]):
                raise UsageError(
                    f"{str(self.path / 'sources.jsonl')!r}, line {number} is broken: remove that line, or use another "
                    "--class_data_dir"
                )
            if record["class_prompt"] != self.class_prompt:
                raise UsageError(
                    f"{str(self.path)!r} holds images of {record['class_prompt']!r}: give another --class_data_dir for "
                    f"{self.class_prompt!r}"
                )
            records.append(record)
        return records

    def _finish_interrupted(self) -> None:
        for record in self.records:
            if self._hidden(record).is_file() and not self._image(record).exists():
                self._hidden(record).rename(self._image(record))
        for leftover in (*self.images_path.glob(".*.part"), *self.path.glob(".*.tmp")):
            leftover.unlink()

    def _adopt(self) -> None:
        """Take over what diffusers' example has retrieved: the lists without a ``sources.jsonl``."""
        present = [self.path / name for name in self.LISTS if (self.path / name).is_file()]
        pictures = [path for path in self.images_path.iterdir() if not path.name.startswith(".")]
        if not present and not pictures:
            return
        lines = [path.read_text("utf-8", "replace").removesuffix("\n").split("\n") for path in present]
        if len(present) < len(self.LISTS) or len({len(entries) for entries in lines}) > 1:
            raise UsageError(
                f"{str(self.path)!r} holds images whose lists ({', '.join(self.LISTS)}) are missing or do not belong "
                "together: give another --class_data_dir, or empty this one"
            )
        for caption, url, image in zip(*lines, strict=True):
            path = self.images_path / Path(image.strip()).name
            if not re.fullmatch(r"\d{1,9}\.\w{1,5}", path.name) or not path.is_file():
                continue
            try:
                mark = fingerprint(load_image(path))
            except Exception:  # the example keeps whatever a server has sent
                continue
            self.records.append(
                {
                    "file": path.name,
                    "caption": one_line(caption) or self.class_prompt,
                    "url": one_line(url),
                    "class_prompt": self.class_prompt,
                    "fingerprint": f"{mark:064x}",
                }
            )
        self._journal.write(b"".join(map(_as_line, self.records)))


def _as_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=True).encode() + b"\n"


def _is_json(text: bytes) -> bool:
    try:
        return bool(json.loads(text))
    except ValueError:
        return False


# --- filling it ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run has left out and why, and what went wrong with the source, if anything."""

    left_out: Counter[str] = field(default_factory=Counter)
    trouble: str | None = None


def fill(folder: ClassFolder, source: Source, args: argparse.Namespace) -> Outcome:
    """Take candidates into the folder, in the order in which the source ranks them, until it has enough.

    Pictures are fetched and decoded side by side, but taken in order: the result does not depend on which server was
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

    def prepare(candidate: Candidate) -> Picture:
        data = downloader.fetch(candidate.address) if candidate.picture is None else candidate.picture
        return check_picture(data, args.min_size, args.max_size, args.max_megapixels * 1e6)

    have = len(folder.kept())
    candidates = _unknown(source.candidates(folder.class_prompt, args.num_class_images), folder, outcome)
    pending: deque[tuple[Candidate, Future[Picture]]] = deque()
    pool = ThreadPoolExecutor(args.connections)
    # miniters=0: what is left out is shown too, though it is no step ahead.
    bar = tqdm(total=args.num_class_images, initial=have, desc=folder.class_prompt, unit="image", miniters=0)
    try:
        while have < args.num_class_images:
            # Not all that could be needed at once: near the end that would be downloads for nothing.
            ahead = min(2 * args.connections, 2 * (args.num_class_images - have) + 4)
            is_ready = bool(pending) and pending[0][1].done()
            if not is_ready and len(pending) < ahead and (candidate := next(candidates, None)) is not None:
                pending.append((candidate, pool.submit(prepare, candidate)))
            elif pending:
                taken = _take(*pending.popleft(), folder, outcome)
                have += taken
                bar.set_postfix_str(summary(outcome.left_out, 3), refresh=False)
                bar.update(taken)
            else:
                break
    finally:
        downloader.stop()
        pool.shutdown(cancel_futures=True)
        bar.close()
    return outcome


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


def _take(candidate: Candidate, future: Future[Picture], folder: ClassFolder, outcome: Outcome) -> bool:
    try:
        picture = future.result()
    except Refused as refusal:
        outcome.left_out[str(refusal)] += 1
        return False
    if folder.has_near_duplicate(picture):
        outcome.left_out["near-duplicate"] += 1
        return False
    folder.add(picture, candidate)
    return True


# --- reporting -----------------------------------------------------------------------------------


def summary(left_out: Counter[str], most: int | None = None) -> str:
    """The reasons on one line, commonest first."""
    return ", ".join(f"{number} {reason}" for reason, number in left_out.most_common(most) if number)


def table(left_out: Counter[str]) -> str:
    """The reasons as a small table, commonest first."""
    rows = [(str(number), reason) for reason, number in left_out.most_common() if number]
    return "\n".join(["left out  reason", *(f"{number:>8}  {reason}" for number, reason in rows)]) if rows else ""


def retrieve(class_prompt: str, path: Path, source: Source, args: argparse.Namespace) -> str | None:
    """Fill the folder of one class, and say what was done.

    Returns:
        What went wrong, on one line; None where there are as many images as asked for.

    Raises:
        UsageError: where the folder cannot be used.
    """
    folder = ClassFolder(path, class_prompt)
    try:
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
        raise UsageError(f"{str(path)!r} cannot be written to: {error.strerror or error}") from error
    finally:
        folder.close()


def _report(folder: ClassFolder, outcome: Outcome, wanted: int) -> str | None:
    have = len(folder.kept())
    if have == 0 and outcome.trouble:
        return outcome.trouble
    if have:
        left_out = f" ({summary(outcome.left_out)} left out)" if outcome.left_out and have >= wanted else ""
        print(f"{have} images in {folder.path}{left_out}{_glance(folder)}")
    if have >= wanted:
        return None
    print(table(outcome.left_out))
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
        raise UsageError("; ".join(dict.fromkeys(problems)))


if __name__ == "__main__":
    try:
        main()
    except (UsageError, SourceError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was found is kept, and the same command goes on from there")
