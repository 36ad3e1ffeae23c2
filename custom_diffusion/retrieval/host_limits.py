"""When each host may be asked again, and by how many connections at a time.

A server that answers with HTTP status 429 (too many requests) or 503 (overloaded) wants a pause, and it wants the
pause from everybody in this process: from all downloads, and from the search service where it is on the same host.
"""

from __future__ import annotations

import contextlib
import email.utils
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC
from urllib.parse import urlsplit

from custom_diffusion.retrieval.messages import duration, note

# With these a server asks for a pause.
PAUSE_STATUS = (429, 503)

# Nobody waits longer than this for a host: another source may have what is wanted now.
LONGEST_PAUSE = 60.0

# Pauses up to this many seconds pass without a word.
UNANNOUNCED = 3.0

# The first pause of a host that does not say how long it should be; each further one is twice as long.
FIRST_PAUSE = 1.0

# Servers have been seen to ask for years.
_MOST = 7 * 86400.0


class PauseTooLong(Exception):
    """A host wants a longer pause than anybody waits for.

    Args:
        host: its name, with its port where that is not the usual one.
        seconds: until it may be asked again.
    """

    def __init__(self, host: str, seconds: float) -> None:
        super().__init__(f"{host} asks for a pause of {duration(seconds)}")
        self.host = host
        self.seconds = seconds


class Stopped(Exception):
    """The run ended while this request was waiting for its turn."""


@dataclass
class _Host:
    name: str
    active: int = 0
    not_before: float = 0.0
    refused_at: float = 0.0
    refusals: int = 0
    status: int = 0
    is_announced: bool = False


class HostLimits:
    """Pauses and connections per host; shared by all that one run asks, and safe to use from several threads."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Host] = {}
        self._changed = threading.Condition()

    def seconds_until(self, address: str) -> float:
        """Seconds until the host of an address may be asked; 0 if it may be now, or is no host."""
        try:
            name = host_of(address)
        except ValueError:
            return 0.0
        with self._changed:
            host = self._hosts.get(name)
            return max(0.0, host.not_before - time.monotonic()) if host else 0.0

    @contextlib.contextmanager
    def turn(
        self, address: str, most: int | None, patience: Callable[[], float], stopped: threading.Event
    ) -> Iterator[float]:
        """Hold one of the connections to a host, and wait until the host may be asked.

        Args:
            address: anything on the host.
            most: connections to the host at a time; no limit if None.
            patience: seconds that a pause may last from now on.
            stopped: ends the wait.

        Yields:
            Seconds for which other connections were in the way.

        Raises:
            PauseTooLong: where the host wants a longer pause.
            Stopped: where ``stopped`` is set.
            ValueError: for an address without a host.
        """
        name = host_of(address)
        with self._changed:
            host = self._hosts.setdefault(name, _Host(name))
            queued = self._wait_for_turn(host, most, patience, stopped)
            host.active += 1
        try:
            yield queued
        finally:
            with self._changed:
                host.active -= 1
                self._changed.notify_all()

    def _wait_for_turn(
        self, host: _Host, most: int | None, patience: Callable[[], float], stopped: threading.Event
    ) -> float:
        queued = 0.0
        while True:
            if stopped.is_set():
                raise Stopped
            pause = host.not_before - time.monotonic()
            if pause > 0:
                if pause > min(patience(), LONGEST_PAUSE):
                    raise PauseTooLong(host.name, pause)
                _announce(host, pause)
                self._changed.wait(min(pause, 0.5))
            # After a pause one request goes ahead, to see whether the host is well again.
            elif host.active >= (1 if host.refusals else most or 2**20):
                started = time.monotonic()
                self._changed.wait(0.5)
                queued += time.monotonic() - started
            else:
                return queued

    def pause(self, address: str) -> None:
        """Wait until the host of an address may be asked, without taking one of its connections.

        Raises:
            PauseTooLong: where that takes longer than :data:`LONGEST_PAUSE`.
        """
        with self.turn(address, None, lambda: LONGEST_PAUSE, threading.Event()):
            pass

    def wants_long_pause(self, address: str) -> bool:
        """Whether the host of an address wants a longer pause than anybody waits for."""
        return self.seconds_until(address) > LONGEST_PAUSE

    def answered(self, address: str, status: int, headers: Mapping[str, str], started: float) -> None:
        """Take note of what a host has answered: it is well, or it wants a pause.

        Args:
            address: what was asked.
            status: of the reply.
            headers: of the reply; ``Retry-After`` says how long the pause should be.
            started: when the request began, in seconds of ``time.monotonic``.
        """
        name, now = host_of(address), time.monotonic()
        asked = retry_after(headers)
        with self._changed:
            host = self._hosts.setdefault(name, _Host(name))
            if status in PAUSE_STATUS or (asked and status in (500, 502, 504)):
                # Replies to requests that were on their way together are one refusal.
                host.refusals += started >= host.refused_at
                host.refused_at, host.status = now, status
                until = now + min(asked or FIRST_PAUSE * 2.0 ** (min(host.refusals, 20) - 1), _MOST)
                if until > host.not_before:
                    host.not_before, host.is_announced = until, False
            elif started >= host.refused_at:
                host.refusals = 0
            self._changed.notify_all()


def _announce(host: _Host, pause: float) -> None:
    if not host.is_announced and pause > UNANNOUNCED:
        note(f"waiting {duration(pause)}, as {host.name} asks (HTTP status {host.status})")
        host.is_announced = True


def host_of(address: str) -> str:
    """The host of an address, with its port where that is not the usual one.

    Raises:
        ValueError: for an address without a host, or with a port that is none.
    """
    parts = urlsplit(address)
    name, port = parts.hostname, parts.port
    if not name:
        raise ValueError(f"{address!r} names no host")
    name = name.rstrip(".")
    return name if port in (None, 80, 443) else f"{name}:{port}"


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds of a ``Retry-After`` header, which may also be a date; 0 where there is none, or it is over."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return float(text[:20])
    try:
        until = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return 0.0
    try:
        # The server's clock, as far as it tells: this machine's may be wrong.
        now = email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except (ValueError, TypeError, IndexError):
        now = time.time()
    return max(0.0, (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - now)
