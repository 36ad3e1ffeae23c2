"""Fetching images that strangers serve: only over http(s), never too much, never for ever, and politely.

Behind an address may be a body without end, a redirect to anywhere, or a server that wants a pause. This module is
where that is dealt with; the rest sees bytes, or a short reason why there are none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from custom_diffusion.retrieval.addresses import location
from custom_diffusion.retrieval.guarded_session import IDLE_SECONDS, AddressGuard, Deadline, guarded_session
from custom_diffusion.retrieval.host_limits import PAUSE_STATUS, HostLimits, PauseTooLong, Stopped, host_of
from custom_diffusion.retrieval.sources import Postponed, Refused

MAX_REDIRECTS = 5
ATTEMPTS = 3
CONNECT_SECONDS = 5.0

# What may be over in a moment.
RETRIED_STATUS = (*PAUSE_STATUS, 500, 502, 504)

# Owners of images say with these, in X-Robots-Tag, that no model should be trained on them; img2dataset heeds them.
OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")

# The most connections to a host at a time, whatever a source allows: Wikimedia's robot policy.
HOST_LIMITS = {"upload.wikimedia.org": 2, "thumb.wikimedia.org": 2}


class Downloader:
    """Fetches many addresses side by side; safe to use from several threads.

    Args:
        user_agent: how to introduce oneself.
        seconds: the most that one address may take, redirects, retries and pauses included.
        max_bytes: the longest body.
        private_hosts: host names or addresses inside a private network that may be asked all the same.
        per_host: the most connections to one host at a time; no limit if None.
        limits: of hosts, where others ask the same ones.
        contact_hosts: hosts that refuse whoever does not say whom to write to.
    """

    def __init__(
        self,
        user_agent: str,
        seconds: float = 30.0,
        max_bytes: int = 20 * 2**20,
        private_hosts: Iterable[str] = (),
        per_host: int | None = None,
        limits: HostLimits | None = None,
        contact_hosts: Iterable[str] = (),
    ) -> None:
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.per_host = per_host
        self.contact_hosts = frozenset(contact_hosts)
        self.stopped = threading.Event()
        self.limits = limits or HostLimits()
        self._guard = AddressGuard(private_hosts)
        self._deadline = Deadline()
        self._session = guarded_session(user_agent, self._guard, self._deadline, self.stopped)

    def stop(self) -> None:
        """Let every download that is under way fail soon."""
        self.stopped.set()

    def fetch(self, address: str) -> bytes:
        """The body behind an address.

        Raises:
            Refused: where there is none, it is too long, takes too long, or the address may not be asked.
            Postponed: where a host wants a longer pause than this address may take.
        """
        self._deadline.at = time.monotonic() + self.seconds
        for attempt in range(ATTEMPTS):
            try:
                return self._fetch_once(address)
            except _WantsPause as failure:
                if attempt + 1 == ATTEMPTS:
                    seconds = self.limits.seconds_until(failure.address)
                    raise Postponed(host_of(failure.address), seconds) from failure
            except _Failed as failure:
                pause = 0.5 * 2**attempt
                if attempt + 1 == ATTEMPTS or pause > self._deadline.seconds_left() or self.stopped.wait(pause):
                    raise Refused(str(failure)) from failure
        raise AssertionError("every attempt returns or raises")

    def _fetch_once(self, address: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            host = _checked_host(address)
            try:
                # A turn for each hop: a redirect must not lead around the limits of the host that it leads to.
                with self.limits.turn(
                    address, HOST_LIMITS.get(host, self.per_host), self._deadline.seconds_left, self.stopped
                ) as queued:
                    self._deadline.at += queued
                    body_or_address = self._ask(address, host)
            except PauseTooLong as pause:
                raise Postponed(pause.host, pause.seconds) from pause
            except Stopped as stopped:
                raise Refused("stopped") from stopped
            if isinstance(body_or_address, bytes):
                return body_or_address
            address = body_or_address
        raise Refused("too many redirects")

    def _ask(self, address: str, host: str) -> bytes | str:
        """The body behind an address, or the address that it redirects to."""
        try:
            if requests.utils.get_environ_proxies(address):
                self._guard.check_before_proxy(host)
            with self._get(address) as response:
                if response.is_redirect:
                    return urljoin(address, location(response))
                self._check_headers(response, address, host)
                return self._read(response)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise self._explained(error) from error

    def _get(self, address: str) -> requests.Response:
        left = self._deadline.seconds_left()
        if left <= 0:
            raise TimeoutError
        started = time.monotonic()
        timeout = (min(CONNECT_SECONDS, left), min(IDLE_SECONDS, left))
        response = self._session.get(address, stream=True, allow_redirects=False, timeout=timeout)
        self.limits.answered(address, response.status_code, response.headers, started)
        return response

    def _check_headers(self, response: requests.Response, address: str, host: str) -> None:
        status = response.status_code
        if status in PAUSE_STATUS:
            raise _WantsPause(address)
        if status in RETRIED_STATUS:
            raise _Failed(f"HTTP status {status}")
        if status == 403 and host in self.contact_hosts:
            raise Refused("HTTP status 403: the host wants to know whom to write to, give --contact you@example.org")
        if status != 200:
            raise Refused(f"HTTP status {status}")
        directives = response.headers.get("X-Robots-Tag", "").lower().replace(",", " ").split()
        if any(directive in OPT_OUT_DIRECTIVES for directive in directives):
            raise Refused("its owner opts out (X-Robots-Tag)")
        # What claims to be an image is seen when it is decoded, and so is an image that claims to be a page.
        if response.headers.get("Content-Type", "").lower().startswith(("video/", "audio/")):
            raise Refused("no image")

    def _read(self, response: requests.Response) -> bytes:
        body = bytearray()
        if (response.raw.length_remaining or 0) > self.max_bytes:
            raise Refused("too many bytes")
        while chunk := response.raw.read1(2**16, decode_content=False):
            body += chunk
            if len(body) > self.max_bytes:
                raise Refused("too many bytes")
            if self._deadline.seconds_left() <= 0:
                raise Refused("too slow")
        return bytes(body)

    def _explained(self, error: Exception) -> Exception:
        slow = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
        if isinstance(error, slow) or self._deadline.seconds_left() <= 0:
            return Refused("too slow")
        if isinstance(error, ValueError):
            return Refused("no valid http(s) address")
        if isinstance(error, requests.exceptions.SSLError):
            return Refused("no answer")
        return _Failed("no answer")


class _Failed(Exception):
    """Something that may be over in a moment."""


class _WantsPause(Exception):
    """The host has asked for a pause, which :class:`HostLimits` knows."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


def _checked_host(address: str) -> str:
    """The host of an http(s) address; anything else is refused."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Refused("no valid http(s) address") from None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise Refused("no valid http(s) address")
    return host.lower()
