"""The images of one class on disk, kept so that nothing gets lost."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from custom_diffusion.data.class_lists import CAPTIONS, IMAGES, LISTS, lines_of, without_blank_end, write_lists
from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text, remove_half_written
from custom_diffusion.images import contact_sheet, load_image, write_image
from custom_diffusion.retrieval.checking import CheckedImage
from custom_diffusion.retrieval.fingerprints import Fingerprint, SeenImages
from custom_diffusion.retrieval.sources import Candidate
from custom_diffusion.text import one_line

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not kept apart
    fcntl = None


class ClassFolder:
    """The images of one class: ``images/``, ``sources.jsonl``, and the lists that training reads.

    ``sources.jsonl`` has a line for every image with its origin, caption, licence and fingerprint. It is what a run
    that continues starts from; ``caption.txt``, ``urls.txt`` and ``images.txt`` follow from it, except for captions
    that someone has edited. An image is written under a hidden name first, then its line, and then it gets its name:
    whenever a run is killed, the next one knows what to finish.

    Args:
        path: the folder; made if it is not there.
        class_prompt: what the images show.
        near_duplicate_tolerance: how different near-duplicates may be; see :class:`SeenImages`.

    Raises:
        UserError: where the folder cannot be used, holds another class, or what no list names.
    """

    def __init__(self, path: Path, class_prompt: str, near_duplicate_tolerance: float = 1.0) -> None:
        self.path = path
        self.class_prompt = class_prompt
        self.near_duplicate_tolerance = near_duplicate_tolerance
        self.images_path = path / "images"
        self._made = [folder for folder in (self.images_path, path, *path.parents) if not folder.exists()]
        try:
            self.images_path.mkdir(parents=True, exist_ok=True)
            self._journal = (path / "sources.jsonl").open("a+b", buffering=0)
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be written to: {error.strerror} (class_data_dir)") from error
        self._lock()
        try:
            self.records = self._read()
            self._finish_interrupted()
            self._take_edited_captions()
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

    def has_near_duplicate(self, image: CheckedImage) -> bool:
        """Whether an image like this one was taken before."""
        return self._seen.has_near_duplicate(image.fingerprint)

    @functools.cached_property
    def _seen(self) -> SeenImages:
        seen = SeenImages(self.near_duplicate_tolerance)
        with ThreadPoolExecutor() as pool:
            for fingerprint in pool.map(self._fingerprint, self.records):
                seen.add(fingerprint)
        return seen

    def _fingerprint(self, record: dict[str, Any]) -> Fingerprint:
        """The fingerprint of a record; one by an older version is taken from its image, if that is still there."""
        if not record.get("thumbnail") and (path := self._image(record)).is_file():
            try:
                return Fingerprint.of(load_image(path))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                pass  # something that somebody has put in the place of an image
        return Fingerprint.read(record["fingerprint"], record.get("thumbnail", ""))

    # --- writing ---------------------------------------------------------------------------------

    def add(self, image: CheckedImage, candidate: Candidate) -> None:
        """Take an image in."""
        record = {
            "file": f"{self._free_number()}.jpg",
            "caption": one_line(candidate.caption) or self.class_prompt,
            "url": one_line(candidate.origin),
            "class_prompt": self.class_prompt,
            # What people look for comes before what is for this program.
            **candidate.credit,
            **_marks(image.fingerprint),
        }
        self._seen.add(image.fingerprint)
        hidden = self._hidden(record)
        with hidden.open("wb") as file:
            file.write(image.jpeg)
            file.flush()
            os.fsync(file.fileno())
        self._write(journal_line(record))
        self.records.append(record)
        hidden.rename(self._image(record))

    def _write(self, lines: bytes) -> None:
        # In one piece, so that a killed run leaves no more than the last line incomplete.
        if self._journal.write(lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _hidden(self, record: dict[str, Any]) -> Path:
        return self.images_path / f".{record['file']}.part"

    def _free_number(self) -> int:
        number = 1 + max((int(record["file"].partition(".")[0]) for record in self.records), default=-1)
        while (self.images_path / f"{number}.jpg").exists():
            number += 1
        return number

    def write_lists(self) -> None:
        """Bring the lists that training reads up to date; those that are up to date are not touched."""
        write_lists(self.path, [(self._image(record), record["caption"], record["url"]) for record in self.kept()])

    def write_contact_sheet(self, columns: int = 10, most: int = 400) -> Path:
        """All images (or the first ones of very many) small on one."""
        paths = self.image_paths()[:most]
        rows = [paths[start : start + columns] for start in range(0, len(paths), columns)]
        write_image(self.path / "contact_sheet.jpg", contact_sheet(rows, side=128), "JPEG", quality=95)
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
            # Only closed: what is in the folder, even an empty file, is the other run's.
            self._journal.close()
            raise UserError(f"another run is filling {str(self.path)!r}: wait for it, or end it") from None
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
            if not line.strip():  # from a text editor
                continue
            try:
                record = json.loads(line)
                is_whole = all(isinstance(record[name], str) for name in ("file", "caption", "url", "class_prompt"))
                Fingerprint.read(record["fingerprint"], record.get("thumbnail", ""))
            except (ValueError, TypeError, KeyError, RecursionError):
                is_whole = False
            if not is_whole or not re.fullmatch(r"\d{1,9}\.\w{1,5}", record["file"]):
                raise UserError(
                    f"{str(self.path / 'sources.jsonl')!r}, line {number} is broken: remove that line, or use another "
                    "--class_data_dir"
                )
            if record["class_prompt"] != self.class_prompt:
                raise UserError(
                    f"{str(self.path)!r} holds images of {record['class_prompt']!r}: give another --class_data_dir for "
                    f"{self.class_prompt!r}"
                )
            records.append(record)
        return records

    def _finish_interrupted(self) -> None:
        for record in self.records:
            if self._hidden(record).is_file() and not self._image(record).exists():
                self._hidden(record).rename(self._image(record))
        # By our own names alone: whose folder it is, is not known yet.
        for leftover in self.images_path.glob(".*.part"):
            if re.fullmatch(r"\.\d{1,9}\.\w{1,5}\.part", leftover.name):
                leftover.unlink()
        remove_half_written(self.path)

    def _take_edited_captions(self) -> None:
        """What someone has written into the list of captions stands, rather than what was retrieved.

        Raises:
            UserError: where nobody can say to which images they belong.
        """
        path = self.path / CAPTIONS
        if not self.records or not path.is_file():
            return
        try:
            captions = [one_line(line) for line in lines_of(read_text(path))]
        except UnicodeDecodeError as error:
            raise UserError(f"{str(path)!r} is not UTF-8: save it as that") from error
        try:
            names = lines_of(read_text(self.path / IMAGES))
        except (OSError, UnicodeDecodeError):
            names = []
        by_file = {record["file"]: record for record in self.records}
        listed = [by_file.get(Path(name.strip()).name) for name in names]
        # A run that was killed may have written the captions of what it kept, and the names of what was there before.
        fitting = [rows for rows in (listed, self.kept()) if len(rows) == len(captions)]
        if fitting:
            rows = max(fitting, key=lambda rows: _number_of_known(rows, captions))
            for record, caption in zip(rows, captions, strict=True):
                if record is not None and caption:
                    record["caption"] = caption
        elif set(captions) - {record["caption"] for record in self.records} - {""}:
            raise UserError(
                f"{str(path)!r} holds captions of your own, and no longer a line for each line of {IMAGES}: give each "
                "image its line, or remove the file to have the captions that were retrieved"
            )

    def _adopt(self) -> None:
        """Take over what diffusers' example has retrieved: the lists without a ``sources.jsonl``."""
        present = [self.path / name for name in LISTS if (self.path / name).is_file()]
        images = [path for path in self.images_path.iterdir() if not path.name.startswith(".")]
        if not present and not images:
            return
        lists = without_blank_end([lines_of(path.read_bytes().decode("utf-8", "replace")) for path in present])
        if len(present) < len(LISTS) or len({len(lines) for lines in lists}) > 1:
            raise UserError(
                f"{str(self.path)!r} holds images whose lists ({', '.join(LISTS)}) are missing or do not belong "
                "together: give another --class_data_dir, or empty this one"
            )
        for caption, url, image in zip(*lists, strict=True):
            path = self.images_path / Path(image.strip()).name
            if not re.fullmatch(r"\d{1,9}\.\w{1,5}", path.name) or not path.is_file():
                continue
            try:
                fingerprint = Fingerprint.of(load_image(path))
            except Exception:  # the example keeps whatever a server has sent
                continue
            self.records.append(
                {
                    "file": path.name,
                    "caption": one_line(caption) or self.class_prompt,
                    "url": one_line(url),
                    "class_prompt": self.class_prompt,
                    **_marks(fingerprint),
                }
            )
        self._write(b"".join(map(journal_line, self.records)))


def _number_of_known(records: Sequence[dict[str, Any] | None], captions: Sequence[str]) -> int:
    """How many captions are those of the records in their places."""
    pairs = zip(records, captions, strict=True)
    return sum(record is not None and record["caption"] == caption for record, caption in pairs)


def _marks(fingerprint: Fingerprint) -> dict[str, str]:
    bits, small = fingerprint.written()
    return {"fingerprint": bits, "thumbnail": small}


def journal_line(record: dict[str, Any]) -> bytes:
    """A record as a line of ``sources.jsonl``."""
    return json.dumps(record, ensure_ascii=True).encode() + b"\n"


def _is_json(text: bytes) -> bool:
    try:
        return bool(json.loads(text))
    except ValueError:
        return False
