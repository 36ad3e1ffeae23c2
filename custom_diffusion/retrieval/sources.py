"""Where class images come from: every source yields candidates, and retrieve.py fetches, checks and keeps them.

A source is small: ``describe()`` for the user, and ``candidates(class_prompt, wanted)``, best first. To add one, write
a class with these two, and name it in retrieve.py's ``make_source``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from custom_diffusion.errors import UserError


class SourceError(UserError):
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
