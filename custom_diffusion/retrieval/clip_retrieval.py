"""Class images from a clip-retrieval service."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator
from typing import Any

from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.host_limits import HostLimits
from custom_diffusion.retrieval.services import Service, told_by
from custom_diffusion.retrieval.sources import Candidate, Source, SourceError
from custom_diffusion.retrieval.words import text_or_empty
from custom_diffusion.text import one_line


class ClipRetrieval(Source):
    """A clip-retrieval service: nearest neighbours in CLIP's space.

    Args:
        url: of the service, with or without ``/knn-service``.
        user_agent: how to introduce oneself.
        indice_name: which of its indices; the service's first if None.
        modality: "image" searches images, "text" captions.
        aesthetic_score, aesthetic_weight: prefer images that people like; nothing where the service cannot.
        deduplicate: let the service leave out near-duplicates.
        limits: of hosts, where others ask the same ones.
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
        limits: HostLimits | None = None,
    ) -> None:
        super().__init__(limits)
        base = url.rstrip("/").removesuffix("/knn-service")
        self.service = Service("the clip-retrieval service", base, user_agent, limits=self.limits)
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
        known: set[tuple[str, ...]] = set()
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
            has = f", but: {one_line(', '.join(map(str, names)))}" if names else ""
            raise UserError(f"{self.service.name} at {self.service.url} has no index {self.indice_name!r}{has}")

    def _ask(self, class_prompt: str, number: int) -> list[Any]:
        query = {"text": class_prompt, "num_images": number, "num_result_ids": number} | self.query
        reply = self.service.post("/knn-service", query)
        if not isinstance(reply, list):
            told = told_by(reply) or "no list of results: is it a clip-retrieval service?"
            raise SourceError(f"{self.service.name} at {self.service.url} answers: {told}")
        return reply

    def _candidate(self, entry: Any) -> Iterator[Candidate]:
        entry = entry if isinstance(entry, dict) else {}
        address, caption = text_or_empty(entry.get("url")).strip(), text_or_empty(entry.get("caption"))
        image = _decode_base64(text_or_empty(entry.get("image")))
        mark = f"id={entry.get('id')}" if entry.get("id") is not None else f"image={_digest(image)}"
        origin = address or f"{self.service.url}/knn-service#{one_line(mark)}"
        if image:
            yield Candidate(origin, caption, image=image)
        elif address:
            yield Candidate(origin, caption, address)
        else:
            self.left_out["neither address nor image"] += 1


def _identity(entry: Any) -> tuple[str, ...]:
    """What tells an entry from others when the same question is asked again."""
    if not isinstance(entry, dict):
        return (str(entry),)
    image = text_or_empty(entry.get("image")) if entry.get("id") is None else ""
    return str(entry.get("id")), text_or_empty(entry.get("url")), _digest(image.encode("utf-8", "replace"))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except (binascii.Error, ValueError):
        return b""
