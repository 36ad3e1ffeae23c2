"""Where class images come from: every source yields candidates, and retrieve.py fetches, checks and keeps them.

A source is small: ``describe()`` for the user, and ``candidates(class_prompt, wanted)``, best first. To add one, write
a class with these two, and name it in retrieve.py's ``make_source``.
"""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.utils import get_auth_from_url

from config import without_userinfo
from images import UserError

OPENVERSE_URL = "https://api.openverse.org"
WIKIMEDIA_URL = "https://commons.wikimedia.org"
# One reply with hundreds of images inside is this long at the most.
MAX_REPLY_BYTES = 2**29
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_JOINERS = "\u200c\u200d"
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


class SourceError(Exception):
    """A source does not answer, or answers nonsense; the message is one line that names it and the way out."""


@dataclass(frozen=True)
class Candidate:
    """What a source offers.

    Attributes:
        origin: where the image comes from, for people and for telling candidates apart.
        caption: may be empty, and hold anything.
        address: where to fetch the image, if ``image`` is not given.
        image: the encoded image itself.
        credit: licence, creator and the like, as far as the source tells.
    """

    origin: str
    caption: str = ""
    address: str | None = None
    image: bytes | None = None
    credit: dict[str, str] = field(default_factory=dict)


class Source:
    """What all sources have in common.

    Attributes:
        hosts: the hosts of the service itself, which may be inside a private network.
        per_host: the most connections to one host; no limit if None.
        left_out: reasons and numbers of entries that never became candidates.
    """

    hosts: Sequence[str] = ()
    per_host: int | None = None

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    def describe(self) -> str:
        """What is asked, for the first line that the user sees."""
        raise NotImplementedError

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """Candidates, best first, until there are no more.

        Args:
            class_prompt: such as "cat".
            wanted: how many images are wanted; a hint, as some candidates will turn out to be of no use.

        Raises:
            SourceError: where the source does not answer.
        """
        raise NotImplementedError


# --- asking a service ----------------------------------------------------------------------------


class Service:
    """An HTTP service that answers in JSON.

    Args:
        name: for messages.
        url: its base address.
        user_agent: how to introduce oneself.
        interval: seconds between the starts of two requests.

    Raises:
        UserError: for an address that is none.
    """

    ATTEMPTS = 4
    SECONDS = 120.0

    def __init__(self, name: str, url: str, user_agent: str, interval: float = 0.0) -> None:
        try:
            parts = urlsplit(url)
            self.host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"--url {url!r} is no address: {error}") from error
        if parts.scheme not in ("http", "https") or not self.host:
            raise UserError(f"--url {url!r} is no http(s) address, such as http://localhost:1234")
        self.name = name
        # User name and password go into a header: messages and origins of images name the address.
        self.url = without_userinfo(url).rstrip("/")
        self.interval = interval
        self._next_request = 0.0
        self._session = requests.Session()
        if any(credentials := get_auth_from_url(url)):
            self._session.auth = credentials
        self._session.headers.update({"User-Agent": user_agent, "Accept": "application/json"})

    def get(self, path: str, parameters: dict[str, Any]) -> Any:
        """The reply to a GET request."""
        return self._request("GET", path, params=parameters)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The reply to a POST request."""
        return self._request("POST", path, json=body)

    def _request(self, method: str, path: str, **content: Any) -> Any:
        for attempt in range(self.ATTEMPTS):
            time.sleep(max(0.0, self._next_request - time.monotonic()))
            self._next_request = time.monotonic() + self.interval
            try:
                with self._session.request(
                    method, self.url + path, timeout=(10, self.SECONDS), allow_redirects=False, stream=True, **content
                ) as response:
                    if response.status_code not in (429, 502, 503, 504) or attempt + 1 == self.ATTEMPTS:
                        return self._reply(response)
                    wait = response.headers.get("Retry-After", "")
            except (requests.RequestException, OSError) as error:
                raise SourceError(f"{self.name} at {self.url} does not answer ({_cause(error)})") from error
            time.sleep(min(60.0, float(wait) if wait.isascii() and wait.isdigit() else 2.0**attempt))
        raise AssertionError("the last attempt returns or raises")

    def _reply(self, response: requests.Response) -> Any:
        status = response.status_code
        if response.is_redirect:
            raise SourceError(
                f"{self.name} at {self.url} has moved: give --url {one_line(response.headers['Location'])}"
            )
        try:
            reply = json.loads(self._body(response))
        except (ValueError, RecursionError):
            reply = None
        if status == 200 and reply is not None:
            return reply
        if status == 429:
            raise SourceError(f"{self.name} at {self.url} says that there were too many requests: try again later")
        told = _message(reply)
        what = f"answers with HTTP status {status}" if status != 200 else "answers with something that is not JSON"
        raise SourceError(f"{self.name} at {self.url} {what}{': ' + told if told else ''}")

    def _body(self, response: requests.Response) -> bytes:
        body, deadline = bytearray(), time.monotonic() + self.SECONDS
        for chunk in response.iter_content(2**16):
            body += chunk
            if len(body) > MAX_REPLY_BYTES or time.monotonic() > deadline:
                raise SourceError(f"{self.name} at {self.url} answers without end")
        return bytes(body)


def _cause(error: Exception) -> str:
    if isinstance(error, requests.Timeout):
        return "time-out"
    text = str(error)
    for sign, meaning in (("NameResolution", "unknown host"), ("refused", "connection refused")):
        if sign in text:
            return meaning
    return type(error).__name__


def _message(reply: Any) -> str:
    """What an error reply says: {"message": ...}, {"detail": ...} or MediaWiki's {"error": {"info": ...}}."""
    if not isinstance(reply, dict):
        return ""
    inner = reply.get("error")
    told = reply.get("message") or reply.get("detail") or (inner.get("info") if isinstance(inner, dict) else inner)
    return one_line(str(told or ""))[:200]


def one_line(text: str) -> str:
    """The text on one line, without anything that cannot be printed or written."""
    # Persian and emoji need the two joiners, which count as not printable.
    return " ".join("".join(letter if letter.isprintable() or letter in _JOINERS else " " for letter in text).split())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


# --- clip-retrieval ------------------------------------------------------------------------------


class ClipRetrieval(Source):
    """A clip-retrieval service: nearest neighbours in CLIP's space.

    Args:
        url: of the service, with or without ``/knn-service``.
        user_agent: how to introduce oneself.
        indice_name: which of its indices; the service's first if None.
        modality: "image" searches images, "text" captions.
        aesthetic_score, aesthetic_weight: prefer images that people like; nothing where the service cannot.
        deduplicate: let the service leave out near-duplicates.
    """

    # The service gets slow beyond this, and what it finds there has little to do with the prompt.
    MOST = 20_000

    def __init__(
        self,
        url: str,
        user_agent: str,
        indice_name: str | None = None,
        modality: str = "image",
        aesthetic_score: int = 9,
        aesthetic_weight: float = 0.1,
        deduplicate: bool = True,
    ) -> None:
        super().__init__()
        base = url.rstrip("/").removesuffix("/knn-service")
        self.service = Service("the clip-retrieval service", base, user_agent)
        self.hosts = (self.service.host,)
        self.indice_name = indice_name
        self.query = {
            "modality": modality,
            "indice_name": indice_name,
            "use_mclip": False,
            "deduplicate": deduplicate,
            "use_safety_model": True,
            "use_violence_detector": True,
            "aesthetic_score": aesthetic_score,
            "aesthetic_weight": aesthetic_weight,
        }

    def describe(self) -> str:
        """Name and address of the service."""
        index = f", index {self.indice_name!r}" if self.indice_name else ""
        return f"the clip-retrieval service at {self.service.url}{index}"

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`. Asks for more and more, as an answer has a fixed length and many dead links."""
        if self.indice_name is not None:
            self._check_index()
        known: set[tuple[str, str] | str] = set()
        number = max(16, wanted + wanted // 2)
        while True:
            entries = self._ask(class_prompt, number)
            new = [entry for entry in entries if _identity(entry) not in known]
            known |= {_identity(entry) for entry in new}
            for entry in new:
                yield from self._candidate(entry)
            # Deduplication makes an answer shorter than asked, so that only one without anything new is the end.
            if not new or number >= self.MOST:
                return
            number = min(2 * number, self.MOST)

    def _check_index(self) -> None:
        names = self.service.get("/indices-list", {})
        if isinstance(names, list) and self.indice_name not in names:
            raise UserError(
                f"{self.service.name} at {self.service.url} has no index {self.indice_name!r}, "
                f"but: {one_line(', '.join(map(str, names)))}"
            )

    def _ask(self, class_prompt: str, number: int) -> list[Any]:
        query = {"text": class_prompt, "num_images": number, "num_result_ids": number} | self.query
        reply = self.service.post("/knn-service", query)
        if not isinstance(reply, list):
            told = _message(reply) or "no list of results: is it a clip-retrieval service?"
            raise SourceError(f"{self.service.name} at {self.service.url} answers: {told}")
        return reply

    def _candidate(self, entry: Any) -> Iterator[Candidate]:
        entry = entry if isinstance(entry, dict) else {}
        address, caption = _text(entry.get("url")).strip(), _text(entry.get("caption"))
        origin = address or f"{self.service.url}/knn-service#id={one_line(str(entry.get('id')))}"
        image = _decode_base64(_text(entry.get("image")))
        if image:
            yield Candidate(origin, caption, image=image)
        elif address:
            yield Candidate(origin, caption, address)
        else:
            self.left_out["neither address nor image"] += 1


def _identity(entry: Any) -> tuple[str, str] | str:
    return (str(entry.get("id")), _text(entry.get("url"))) if isinstance(entry, dict) else str(entry)


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except (binascii.Error, ValueError):
        return b""


# --- public sources ------------------------------------------------------------------------------


class Openverse(Source):
    """Openverse's search of openly licensed images: no key, one request a second, 240 results at most."""

    PAGE_SIZE = 20
    per_host = 8

    def __init__(self, user_agent: str, url: str = OPENVERSE_URL, min_size: int = 0) -> None:
        super().__init__()
        # Anonymous users may ask once a second, and a fifth more is asked of their patience for good measure.
        self.service = Service("Openverse", url, user_agent, interval=1.2)
        self.hosts = (self.service.host,)
        self.min_size = min_size

    def describe(self) -> str:
        """Name and address of the service."""
        return f"Openverse ({self.service.url})"

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`. Photographs only."""
        page, pages = 1, 1
        while page <= pages:
            query = {"q": class_prompt, "page": page, "page_size": self.PAGE_SIZE, "category": "photograph"}
            try:
                reply = self.service.get("/v1/images/", query)
            except SourceError:
                # Pages beyond what an anonymous user may see are refused, whatever the first page promised.
                if page > 12:
                    return
                raise
            results = reply.get("results") if isinstance(reply, dict) else None
            if not isinstance(results, list):
                raise SourceError(f"Openverse at {self.service.url} answers: {_message(reply) or 'no results'}")
            for entry in results:
                yield from self._candidate(entry, class_prompt)
            if not results:
                return
            pages = reply["page_count"] if isinstance(reply.get("page_count"), int) else page
            page += 1

    def _candidate(self, entry: Any, class_prompt: str) -> Iterator[Candidate]:
        if not isinstance(entry, dict) or not _text(entry.get("url")):
            self.left_out["neither address nor image"] += 1
        elif _known_small(entry, self.min_size):
            self.left_out["too small"] += 1
        else:
            names = ("title", "creator", "creator_url", "license", "license_version", "license_url", "attribution")
            credit = {"source": "Openverse"} | {name: one_line(entry[name]) for name in names if _text(entry.get(name))}
            if _text(entry.get("foreign_landing_url")):
                credit["page"] = one_line(entry["foreign_landing_url"])
            caption = caption_of_title(_text(entry.get("title")), class_prompt)
            yield Candidate(entry["url"], caption, entry["url"], credit=credit)


class WikimediaCommons(Source):
    """The search of Wikimedia Commons: no key, freely licensed, described in words."""

    # One of the widths in which Wikimedia serves smaller versions; others are refused.
    WIDTH = 1280
    per_host = 8

    def __init__(self, user_agent: str, url: str = WIKIMEDIA_URL, min_size: int = 0) -> None:
        super().__init__()
        self.service = Service("Wikimedia Commons", url, user_agent, interval=1.0)
        self.hosts = (self.service.host,)
        self.min_size = min_size

    def describe(self) -> str:
        """Name and address of the service."""
        return f"Wikimedia Commons ({self.service.url})"

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`."""
        query = {
            "action": "query",
            "format": "json",
            "formatversion": 2,
            "generator": "search",
            "gsrsearch": f"filetype:bitmap {class_prompt}",
            "gsrnamespace": 6,
            "gsrlimit": 50,
            "prop": "imageinfo",
            "iiprop": "url|size|extmetadata",
            "iiurlwidth": self.WIDTH,
            "iiextmetadatalanguage": "en",
            "iiextmetadatafilter": "ImageDescription|ObjectName|Artist|LicenseShortName|LicenseUrl|Attribution",
        }
        more: dict[str, Any] | None = {}
        while more is not None:
            reply = self.service.get("/w/api.php", query | more)
            if not isinstance(reply, dict) or "error" in reply:
                raise SourceError(f"Wikimedia Commons at {self.service.url} answers: {_message(reply) or 'no results'}")
            pages = (reply.get("query") or {}).get("pages") or []
            for page in sorted((page for page in pages if isinstance(page, dict)), key=_search_rank):
                yield from self._candidate(page, class_prompt)
            more = reply.get("continue") if pages else None
            more = more if isinstance(more, dict) else None

    def _candidate(self, page: dict[str, Any], class_prompt: str) -> Iterator[Candidate]:
        info = (page.get("imageinfo") or [{}])[0]
        address = _text(info.get("url"))
        if not address:
            self.left_out["neither address nor image"] += 1
        elif _known_small(info, self.min_size):
            self.left_out["too small"] += 1
        else:
            if isinstance(info.get("width"), int) and info["width"] > self.WIDTH:
                address = _text(info.get("thumburl")) or address
            told = info.get("extmetadata") or {}
            values = {
                name: plain_text(_text(entry.get("value"))) for name, entry in told.items() if isinstance(entry, dict)
            }
            title = PurePosixPath(_text(page.get("title")).removeprefix("File:")).stem
            credit = {
                "source": "Wikimedia Commons",
                "title": title,
                "creator": values.get("Artist", ""),
                "license": values.get("LicenseShortName", ""),
                "license_url": values.get("LicenseUrl", ""),
                "attribution": values.get("Attribution", ""),
                "page": one_line(_text(info.get("descriptionurl"))),
            }
            caption = caption_of_title(
                values.get("ImageDescription") or values.get("ObjectName") or title, class_prompt
            )
            yield Candidate(address, caption, address, credit={name: text for name, text in credit.items() if text})


def _search_rank(page: dict[str, Any]) -> int:
    return page["index"] if isinstance(page.get("index"), int) else 0


def _known_small(entry: dict[str, Any], min_size: int) -> bool:
    sides = [entry.get("width"), entry.get("height")]
    return all(isinstance(side, int) and side > 0 for side in sides) and min(sides) < min_size


def plain_text(text: str) -> str:
    """The words of a piece of HTML, on one line."""
    return one_line(html.unescape(re.sub(r"<[^>]*>", " ", text)))


def caption_of_title(title: str, class_prompt: str) -> str:
    """A caption from a title: titles of the web may be file names, and often do not say what is to be seen."""
    title = one_line(title)
    if len(title) > 300:
        title = title[:300].rpartition(" ")[0] or title[:300]
    words = re.findall(r"[^\W\d_]+", title)
    is_file_name = not words or re.fullmatch(r"(?i)(img|dscn?|dsc|p|pict?|image|photo)?[\W_\d]*(\.\w{3,4})?", title)
    if is_file_name:
        return class_prompt
    return title if has_words(title, query_words(class_prompt)) else f"{class_prompt}, {title}"


class Several(Source):
    """Sources one after the other: where one has no more, or does not answer, the next is asked."""

    def __init__(self, sources: Sequence[Source], warn: Callable[[str], Any]) -> None:
        super().__init__()
        self.sources = sources
        self.hosts = [host for source in sources for host in source.hosts]
        self.per_host = max((source.per_host for source in sources if source.per_host), default=None)
        self._warn = warn

    def describe(self) -> str:
        """All of them."""
        return ", then ".join(source.describe() for source in self.sources)

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`; raises only where no source answers."""
        errors = []
        for source in self.sources:
            # Shared, so that what a source has counted so far is known even when it fails.
            source.left_out = self.left_out
            try:
                yield from source.candidates(class_prompt, wanted)
            except SourceError as error:
                errors.append(str(error))
                if len(errors) < len(self.sources):
                    self._warn(str(error))
        if len(errors) == len(self.sources):
            raise SourceError("; ".join(errors))


# --- one's own images --------------------------------------------------------------------------

_FILLERS = {"a", "an", "the", "of", "photo", "photograph", "picture", "image"}


def query_words(text: str) -> list[str]:
    """The words that a caption must hold, without those that say nothing about what is to be seen."""
    words = _words(text)
    return [word for word in words if word not in _FILLERS] or words


def has_words(caption: str, words: Iterable[str]) -> bool:
    """Whether all words are in the caption, as whole words; "cat" also finds "cats"."""
    present = set(_words(caption))
    return all(word in present or (not word.isascii() and word in caption.lower()) for word in words)


def _words(text: str) -> list[str]:
    return [_singular(word) for word in re.findall(r"[^\W\d_]+|\d+", text.lower())]


def _singular(word: str) -> str:
    for ending, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + singular
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


class LocalFiles(Source):
    """A folder of images (with subfolders and tars), or a tar, searched by the words of the captions.

    A caption lies beside its image, under the same name: ``7.jpg``, ``7.txt`` or ``7.json`` ({"caption": ...}), as
    img2dataset writes them. Without one, the words of the path are searched.

    Args:
        path: folder or tar file.
        words: words that a caption must hold; those of the class prompt if None, and any caption will do if empty.
        max_bytes: longer images are left out.

    Raises:
        UserError: where there is no such folder or tar.
    """

    def __init__(self, path: str, words: str | None = None, max_bytes: int = 20 * 2**20) -> None:
        super().__init__()
        self.path = Path(path)
        self.words = words
        self.max_bytes = max_bytes
        if not self.path.exists():
            raise UserError(f"there is no folder or tar {path!r} (--path)")
        if self.path.is_file() and not path.lower().endswith(TAR_ENDINGS):
            raise UserError(f"--path {path!r} is neither a folder nor a tar ({', '.join(TAR_ENDINGS)})")

    def describe(self) -> str:
        """The folder or tar."""
        return str(self.path)

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`; in the order of the names."""
        words = query_words(class_prompt if self.words is None else self.words)
        try:
            for path in [self.path] if self.path.is_file() else sorted(self.path.rglob("*")):
                if path.name.startswith(".") or not path.is_file():
                    continue
                if path.name.lower().endswith(TAR_ENDINGS):
                    yield from self._of_tar(path, words)
                elif path.suffix.lower() in IMAGE_ENDINGS:
                    yield from self._of_file(path, words)
        except OSError as error:
            raise SourceError(f"{error.filename or str(self.path)!r} cannot be read: {error.strerror}") from error

    def _of_file(self, path: Path, words: Sequence[str]) -> Iterator[Candidate]:
        beside = {
            ending: path.with_suffix(ending).read_bytes()
            for ending in (".txt", ".json")
            if path.with_suffix(ending).is_file()
        }
        name = path.relative_to(self.path).as_posix()
        if path.stat().st_size > self.max_bytes:
            self.left_out["too many bytes"] += 1
        else:
            yield from self._matching(name, beside, words, path.resolve().as_uri(), path.read_bytes)

    def _of_tar(self, path: Path, words: Sequence[str]) -> Iterator[Candidate]:
        # Read in one pass, which also works for compressed ones; the files of a sample lie side by side.
        try:
            with tarfile.open(path, "r|*") as tar:
                key, parts, image = None, {}, None
                for member in tar:
                    stem, dot, ending = PurePosixPath(member.name).name.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    here = str(PurePosixPath(member.name).parent / stem)
                    if here != key:
                        yield from self._of_sample(path, image, parts, words)
                        key, parts, image = here, {}, None
                    ending = dot + ending.lower()
                    if member.size > self.max_bytes:
                        self.left_out["too many bytes"] += ending.endswith(IMAGE_ENDINGS)
                    elif ending.endswith((*IMAGE_ENDINGS, ".txt", ".json")):
                        parts[ending] = tar.extractfile(member).read()
                        image = (member.name, ending) if ending.endswith(IMAGE_ENDINGS) else image
                yield from self._of_sample(path, image, parts, words)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise SourceError(f"{str(path)!r} is a broken tar: {one_line(str(error))}") from error

    def _of_sample(
        self, tar: Path, image: tuple[str, str] | None, parts: dict[str, bytes], words: Sequence[str]
    ) -> Iterator[Candidate]:
        if image is not None:
            name, ending = image
            origin = f"{tar.resolve().as_uri()}#{one_line(name)}"
            yield from self._matching(name, parts, words, origin, lambda: parts[ending])

    def _matching(
        self, name: str, beside: dict[str, bytes], words: Sequence[str], origin: str, read: Callable[[], bytes]
    ) -> Iterator[Candidate]:
        caption, address = _caption_beside(beside)
        if has_words(caption or name, words):
            yield Candidate(address or origin, caption, image=read())
        else:
            self.left_out["caption without the words"] += 1


def _caption_beside(beside: dict[str, bytes]) -> tuple[str, str]:
    """Caption and web address from the text files beside an image."""
    try:
        told = json.loads(beside.get(".json", b"null"))
    except (ValueError, RecursionError):
        told = None
    told = told if isinstance(told, dict) else {}
    text = beside.get(".txt", b"").decode("utf-8", "replace").strip()
    return text or _text(told.get("caption")), _text(told.get("url"))


class HubDataset(Source):
    """A dataset of the Hugging Face Hub (or a folder that `datasets` can read), streamed, searched by captions.

    Args:
        path: its name, such as "user/dataset", or a folder.
        words: as for :class:`LocalFiles`.
        split: such as "train".
        config: the dataset's configuration, where it has several.
        image_column, caption_column: found by type and name if None. The image column may hold web addresses.

    Raises:
        UserError: where the package is missing.
    """

    IMAGE_COLUMNS = ("image", "img", "jpg", "png", "image_url", "url", "img_url")
    CAPTION_COLUMNS = ("caption", "text", "captions", "txt", "prompt", "description", "title")

    def __init__(
        self,
        path: str,
        words: str | None = None,
        split: str = "train",
        config: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        super().__init__()
        self.path, self.words, self.split, self.config = path, words, split, config
        self.image_column, self.caption_column = image_column, caption_column
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                "--source dataset needs the package datasets: pip install -r requirements-datasets.txt"
            ) from error
        self._datasets = datasets

    def describe(self) -> str:
        """Name and split of the dataset."""
        return f"the dataset {self.path!r}, split {self.split!r}"

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`; in the order of the dataset."""
        words = query_words(class_prompt if self.words is None else self.words)
        try:
            data = self._datasets.load_dataset(self.path, self.config, split=self.split, streaming=True)
            columns = dict(data.features or next(iter(data)))
            image, caption = self._columns(columns)
            if isinstance(columns[image], self._datasets.Image):
                # The encoded bytes: decoding is for those whose caption fits.
                data = data.cast_column(image, self._datasets.Image(decode=False))
            for number, row in enumerate(data.select_columns([image, caption])):
                yield from self._candidate(number, row[image], row[caption], words)
        except UserError:
            raise
        except Exception as error:  # the package raises its own, the Hub's and the readers' errors
            reason = one_line(str(error)) or type(error).__name__
            raise SourceError(f"the dataset {self.path!r} cannot be read: {reason[:300]}") from error

    def _columns(self, columns: dict[str, Any]) -> tuple[str, str]:
        by_type = [name for name, feature in columns.items() if isinstance(feature, self._datasets.Image)]
        image = self.image_column or next(iter(by_type), None) or _named(columns, self.IMAGE_COLUMNS)
        caption = self.caption_column or _named(columns, self.CAPTION_COLUMNS)
        for flag, name in (("--image_column", image), ("--caption_column", caption)):
            if name not in columns:
                known = f"{self.path!r} has the columns {', '.join(columns)}"
                raise UserError(f"{known}, and no {name!r}: choose with {flag}" if name else f"{known}: give {flag}")
        return image, caption

    def _candidate(self, number: int, value: Any, caption: Any, words: Sequence[str]) -> Iterator[Candidate]:
        caption = (
            next((text for text in caption if isinstance(text, str)), "") if isinstance(caption, list) else caption
        )
        if not has_words(_text(caption), words):
            self.left_out["caption without the words"] += 1
        elif isinstance(value, str):
            yield Candidate(value, _text(caption), value)
        elif isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            yield Candidate(f"{self.path}#{self.split}/{number}", _text(caption), image=value["bytes"])
        elif isinstance(value, dict) and value.get("path"):
            yield from self._of_path(number, value["path"], caption)
        else:
            self.left_out["neither address nor image"] += 1

    def _of_path(self, number: int, path: str, caption: str) -> Iterator[Candidate]:
        with self._datasets.utils.file_utils.xopen(path, "rb") as file:
            yield Candidate(f"{self.path}#{self.split}/{number}", caption, image=file.read())


def _named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    by_lower = {column.lower(): column for column in columns}
    return next((by_lower[name] for name in names if name in by_lower), None)
