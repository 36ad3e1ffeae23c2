"""Filling the folder of a class with images from a source."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from custom_diffusion.command_line import CONFIG_NAME, config_text, save_config
from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.checking import CheckedImage, check_image
from custom_diffusion.retrieval.class_folder import ClassFolder
from custom_diffusion.retrieval.download import Downloader
from custom_diffusion.retrieval.messages import duration, note, warn
from custom_diffusion.retrieval.sources import Candidate, Postponed, Refused, Source, SourceError
from custom_diffusion.text import one_line


def user_agent(contact: str) -> str:
    """Who asks, as services want to know."""
    return f"custom-diffusion-retrieve/1.0 (class images for fine-tuning{'; ' * bool(contact)}{contact})"


@dataclass
class Outcome:
    """What became of the candidates of a run.

    Attributes:
        left_out: why candidates were left out, and how many.
        postponed: the hosts that want a long pause, and the seconds that they want.
        trouble: what went wrong with the source, if anything.
        has_kept: whether the run has kept an image.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    postponed: dict[str, float] = field(default_factory=dict)
    trouble: str | None = None
    has_kept: bool = False


def fill(folder: ClassFolder, source: Source, args: argparse.Namespace) -> Outcome:
    """Take candidates into the folder, in the order in which the source ranks them, until it has enough.

    Images are fetched and decoded side by side, but taken in order: the result does not depend on which server was
    quick, nor on interruptions.
    """
    outcome = Outcome()
    source.left_out = outcome.left_out
    downloader = _downloader(source, args)

    def prepare(candidate: Candidate) -> CheckedImage:
        data = downloader.fetch(candidate.address or "") if candidate.image is None else candidate.image
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


def _downloader(source: Source, args: argparse.Namespace) -> Downloader:
    return Downloader(
        user_agent(args.contact),
        args.timeout,
        int(min(args.max_megabytes * 2**20, sys.maxsize)),
        [*source.hosts, *args.private_host],
        source.per_host,
        source.limits,
        source.contact_hosts,
    )


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
    kept = {record["url"] for record in folder.kept()}
    deleted, seen = {record["url"] for record in folder.records} - kept, set()
    try:
        for candidate in candidates:
            origin = one_line(candidate.origin)
            if origin in seen:
                outcome.left_out["the same address again"] += 1
            elif origin in deleted:
                outcome.left_out["deleted from images/ before"] += 1
            elif origin not in kept:
                yield candidate
            seen.add(origin)
    except SourceError as error:
        outcome.trouble = str(error)


def _take(
    candidate: Candidate, future: Future[CheckedImage], folder: ClassFolder, args: argparse.Namespace, outcome: Outcome
) -> bool:
    try:
        image = future.result()
    except Refused as refusal:
        outcome.left_out[str(refusal)] += 1
        if isinstance(refusal, Postponed):
            if refusal.host not in outcome.postponed:
                note(f"{refusal.host} asks for a pause of {duration(refusal.seconds)}: its images are left for later")
            outcome.postponed[refusal.host] = refusal.seconds
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
    folder = ClassFolder(path, class_prompt, args.near_duplicate_tolerance)
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
        return _report(folder, outcome, args)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written to: {error.strerror or error}") from error
    finally:
        folder.close()


def _report(folder: ClassFolder, outcome: Outcome, args: argparse.Namespace) -> str | None:
    have, wanted = len(folder.kept()), args.num_class_images
    if have:
        left_out = f" (left out: {summary(outcome.left_out)})" if outcome.left_out and have >= wanted else ""
        print(f"{have} images in {folder.path}{left_out}{_glance(folder)}")
    if have >= wanted:
        return None
    if any(outcome.left_out.values()):
        print(table(outcome.left_out))
    if have == 0 and outcome.trouble and not outcome.postponed:
        return outcome.trouble
    found = f"{have} of the {wanted} images of {folder.class_prompt!r} found"
    found += f", then {outcome.trouble}" if outcome.trouble else ""
    if outcome.postponed:
        hosts = " and ".join(
            f"{host} asks for a pause of {duration(seconds)}" for host, seconds in outcome.postponed.items()
        )
        number = outcome.left_out[str(Postponed("", 0))]
        return f"{found}; {number} left for later, as {hosts}: run the same command again after that"
    if outcome.trouble:
        return f"{found}; the same command continues from there"
    return f"{found}, and there are no more: {_advice(have, outcome.left_out, args)}"


def _advice(have: int, left_out: Counter[str], args: argparse.Namespace) -> str:
    """What finds more images, or is content with these; each can be pasted behind the same command."""
    advice = []
    if left_out["too small"]:
        advice.append(f"--min_size {max(1, args.min_size // 2)}")
    if left_out["caption without the words"] or left_out["no caption"]:
        advice.append("--words ''")
    if left_out["inside a private network"]:
        advice.append("--private_host and the host, if you trust it")
    if have:
        advice.append(f"--num_class_images {have}")
    return f"give {', '.join([*advice, 'or another --source' if advice else 'another --source'])}"


def _glance(folder: ClassFolder) -> str:
    try:
        return f", all at a glance: {folder.write_contact_sheet()}"
    except (OSError, ValueError, SyntaxError) as error:  # a file that somebody has put in the place of an image
        warn(f"no contact sheet: {one_line(str(error))}")
        return ""
