"""Class images from public search services: Openverse and Wikimedia Commons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from custom_diffusion.retrieval.host_limits import HostLimits
from custom_diffusion.retrieval.services import Service, told_by
from custom_diffusion.retrieval.sources import Candidate, Source, SourceError
from custom_diffusion.retrieval.words import caption_of_title, plain_text, text_or_empty
from custom_diffusion.text import one_line

OPENVERSE_URL = "https://api.openverse.org"
WIKIMEDIA_URL = "https://commons.wikimedia.org"


class Openverse(Source):
    """Openverse's search of openly licensed images: no key, one request a second, 240 results at most."""

    PAGE_SIZE = 20
    MOST_PAGES = 12  # later ones are refused to anonymous users, whatever the first one promises
    per_host = 8

    def __init__(
        self, user_agent: str, url: str = OPENVERSE_URL, min_size: int = 0, limits: HostLimits | None = None
    ) -> None:
        super().__init__(limits)
        # Anonymous users may ask once a second, and a fifth more is asked of their patience for good measure.
        self.service = Service(
            "Openverse", url, user_agent, interval=1.2, limits=self.limits, flags="--source openverse --url"
        )
        self.hosts = (self.service.host,)
        self.min_size = min_size

    def describe(self) -> str:
        """Name and address of the service."""
        return f"Openverse ({self.service.url})"

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`. Photographs only."""
        page, pages = 1, 1
        while page <= min(pages, self.MOST_PAGES):
            query = {"q": class_prompt, "page": page, "page_size": self.PAGE_SIZE, "category": "photograph"}
            reply = self.service.get("/v1/images/", query)
            results = reply.get("results") if isinstance(reply, dict) else None
            if not isinstance(results, list):
                raise SourceError(f"Openverse at {self.service.url} answers: {told_by(reply) or 'no results'}")
            for entry in results:
                yield from self._candidate(entry, class_prompt)
            if not results:
                return
            pages = reply["page_count"] if isinstance(reply.get("page_count"), int) else page
            page += 1

    def _candidate(self, entry: Any, class_prompt: str) -> Iterator[Candidate]:
        address = text_or_empty(entry.get("url")).strip() if isinstance(entry, dict) else ""
        if not address:
            self.left_out["neither address nor image"] += 1
        elif _known_small(entry, self.min_size):
            self.left_out["too small"] += 1
        else:
            names = ("title", "creator", "creator_url", "license", "license_version", "license_url", "attribution")
            credit = {"source": "Openverse"} | {
                name: one_line(entry[name]) for name in names if text_or_empty(entry.get(name))
            }
            if text_or_empty(entry.get("foreign_landing_url")):
                credit["page"] = one_line(entry["foreign_landing_url"])
            caption = caption_of_title(text_or_empty(entry.get("title")), class_prompt)
            yield Candidate(address, caption, address, credit=credit)


class WikimediaCommons(Source):
    """The search of Wikimedia Commons: no key, freely licensed, described in words."""

    # One of the widths in which Wikimedia serves smaller versions; others are refused.
    WIDTH = 1280
    IMAGE_HOSTS = ("upload.wikimedia.org", "thumb.wikimedia.org")
    per_host = 8

    def __init__(
        self,
        user_agent: str,
        url: str = WIKIMEDIA_URL,
        min_size: int = 0,
        limits: HostLimits | None = None,
        has_contact: bool = False,
    ) -> None:
        super().__init__(limits)
        self.service = Service(
            "Wikimedia Commons",
            url,
            user_agent,
            interval=1.0,
            limits=self.limits,
            flags="--source wikimedia --url",
            forbidden="" if has_contact else "tell it whom to write to: --contact you@example.org",
        )
        self.hosts = (self.service.host,)
        self.contact_hosts = () if has_contact else (self.service.host, *self.IMAGE_HOSTS)
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
                raise SourceError(f"Wikimedia Commons at {self.service.url} answers: {told_by(reply) or 'no results'}")
            found = reply.get("query")
            pages = found.get("pages") if isinstance(found, dict) else None
            pages = list(pages.values()) if isinstance(pages, dict) else pages if isinstance(pages, list) else []
            for page in sorted(pages, key=_search_rank):
                yield from self._candidate(page, class_prompt)
            more = reply.get("continue") if pages else None
            more = more if isinstance(more, dict) else None

    def _candidate(self, page: Any, class_prompt: str) -> Iterator[Candidate]:
        infos = page.get("imageinfo") if isinstance(page, dict) else None
        info = infos[0] if isinstance(infos, list) and infos and isinstance(infos[0], dict) else {}
        address = text_or_empty(info.get("url")).strip()
        if not address:
            self.left_out["neither address nor image"] += 1
        elif _known_small(info, self.min_size):
            self.left_out["too small"] += 1
        else:
            if isinstance(info.get("width"), int) and info["width"] > self.WIDTH:
                address = text_or_empty(info.get("thumburl")).strip() or address
            told = info.get("extmetadata")
            values = {
                name: plain_text(text_or_empty(entry.get("value")))
                for name, entry in (told.items() if isinstance(told, dict) else ())
                if isinstance(entry, dict)
            }
            title = PurePosixPath(text_or_empty(page.get("title")).removeprefix("File:")).stem
            credit = {
                "source": "Wikimedia Commons",
                "title": title,
                "creator": values.get("Artist", ""),
                "license": values.get("LicenseShortName", ""),
                "license_url": values.get("LicenseUrl", ""),
                "attribution": values.get("Attribution", ""),
                "page": one_line(text_or_empty(info.get("descriptionurl"))),
            }
            caption = caption_of_title(
                values.get("ImageDescription") or values.get("ObjectName") or title, class_prompt
            )
            yield Candidate(address, caption, address, credit={name: text for name, text in credit.items() if text})


def _search_rank(page: Any) -> int:
    rank = page.get("index") if isinstance(page, dict) else None
    return rank if isinstance(rank, int) else 0


def _known_small(entry: dict[str, Any], min_size: int) -> bool:
    sides = [side for side in (entry.get("width"), entry.get("height")) if isinstance(side, int) and side > 0]
    return len(sides) == 2 and min(sides) < min_size
