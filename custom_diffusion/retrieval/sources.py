"""Where class images come from: every source yields candidates, and retrieve.py fetches, checks and keeps them.

A source is small: ``describe()`` for the user, and ``candidates(class_prompt, wanted)``, best first. To add one, write
a class with these two, and name it in retrieve.py's ``SOURCES`` and ``one_source``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.host_limits import HostLimits
from custom_diffusion.retrieval.messages import warn


class SourceError(UserError):
    """A source does not answer, or answers nonsense; the message is one line that names it and the way out."""


class Refused(Exception):
    """A candidate cannot be used; the message is a short reason, the same for all candidates of its kind."""


class Postponed(Refused):
    """A candidate cannot be used now, because its host wants a long pause.

    Args:
        host: its name.
        seconds: until it may be asked again.
    """

    def __init__(self, host: str, seconds: float) -> None:
        super().__init__("left for later")
        self.host = host
        self.seconds = seconds


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
        contact_hosts: hosts that want to know whom to write to, and have not been told.
        per_host: the most connections to one host; no limit if None.
        limits: when each host may be asked again; shared with the downloads.
        left_out: reasons and numbers of entries that never became candidates.
    """

    hosts: Sequence[str] = ()
    contact_hosts: Sequence[str] = ()
    per_host: int | None = None

    def __init__(self, limits: HostLimits | None = None) -> None:
        self.limits = limits or HostLimits()
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


# This many candidates in a row whose hosts want a long pause: the next ones will be no different.
WAITING_IN_A_ROW = 20


class Several(Source):
    """Sources one after the other: where one has no more, does not answer, or has to wait, the next is asked."""

    def __init__(self, sources: Sequence[Source], limits: HostLimits | None = None) -> None:
        super().__init__(limits)
        self.sources = sources
        self.hosts = [host for source in sources for host in source.hosts]
        self.contact_hosts = [host for source in sources for host in source.contact_hosts]
        self.per_host = max((source.per_host for source in sources if source.per_host), default=None)

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
                yield from until_waiting(source.candidates(class_prompt, wanted), self.limits)
            except SourceError as error:
                errors.append(str(error))
                if len(errors) < len(self.sources):
                    warn(str(error))
        if len(errors) == len(self.sources):
            raise SourceError(" and ".join(errors))


def until_waiting(candidates: Iterator[Candidate], limits: HostLimits) -> Iterator[Candidate]:
    """Candidates until many in a row are on hosts that want a longer pause than anybody waits for."""
    waiting = 0
    for candidate in candidates:
        yield candidate
        waiting = waiting + 1 if candidate.address and limits.wants_long_pause(candidate.address) else 0
        if waiting >= WAITING_IN_A_ROW:
            return
