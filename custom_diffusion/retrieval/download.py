"""Fetching what strangers serve: only over http(s), only from public addresses, never too much and never for ever.

A search reply may hold any address, also one inside the user's own network, and behind it may be a body without end.
This module is where that is dealt with; retrieve.py sees bytes, or a short reason why there are none.
"""

from __future__ import annotations

import functools
import http.cookiejar
import io
import ipaddress
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

MAX_REDIRECTS = 5


ATTEMPTS = 3


RETRIED_STATUS = (429, 500, 502, 503, 504)


# A server that sends nothing for this many seconds will not send anything.
IDLE_SECONDS = 10.0


CONNECT_SECONDS = 5.0


# Owners of images say with these, in X-Robots-Tag, that no model should be trained on them; img2dataset heeds them.
OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")


# The most connections to a host at a time, whatever a source allows: Wikimedia's robot policy.
HOST_LIMITS = {"upload.wikimedia.org": 2, "thumb.wikimedia.org": 2}


class Refused(Exception):
    """A candidate cannot be used; the message is a short reason, the same for all candidates of its kind."""


class Downloader:
    """Fetches many addresses side by side; safe to use from several threads.

    Args:
        user_agent: how to introduce oneself.
        seconds: the most that one address may take, redirects and retries included.
        max_bytes: the longest body.
        private_hosts: host names or addresses inside a private network that may be asked all the same.
        per_host: the most connections to one host at a time; no limit if None.
    """

    def __init__(
        self,
        user_agent: str,
        seconds: float = 30.0,
        max_bytes: int = 20 * 2**20,
        private_hosts: Iterable[str] = (),
        per_host: int | None = None,
    ) -> None:
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.private_hosts = tuple(private_hosts)
        self.per_host = per_host
        self.stopped = threading.Event()
        self._turns: dict[str, threading.Semaphore] = {}
        self._turns_lock = threading.Lock()
        self._current = threading.local()
        self._session = requests.Session()
        # Compressed bodies would be one more way to send a bomb, and images are compressed already.
        self._session.headers.update(
            {"User-Agent": user_agent, "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"}
        )
        self._session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        adapter = HTTPAdapter(pool_connections=64, pool_maxsize=64)
        adapter.poolmanager.pool_classes_by_scheme = {
            "http": self._guarded_pool(urllib3.HTTPConnectionPool),
            "https": self._guarded_pool(urllib3.HTTPSConnectionPool),
        }
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def stop(self) -> None:
        """Let every download that is under way fail soon."""
        self.stopped.set()

    def fetch(self, address: str) -> bytes:
        """The body behind an address.

        Raises:
            Refused: where there is none, it is too long, takes too long, or the address may not be asked.
        """
        host = _checked_host(address)
        with self._turn(host):
            if self.stopped.is_set():
                raise Refused("stopped")
            self._current.deadline = time.monotonic() + self.seconds
            for attempt in range(ATTEMPTS):
                try:
                    return self._fetch_once(address)
                except _Failed as failure:
                    pause = max(0.5 * 2**attempt, failure.wait)
                    if attempt + 1 == ATTEMPTS or pause > self._seconds_left() or self.stopped.wait(pause):
                        raise Refused(str(failure)) from failure
        raise AssertionError("every attempt returns or raises")

    def _fetch_once(self, address: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            host = _checked_host(address)
            if requests.utils.get_environ_proxies(address):
                self._check_before_proxy(host)
            try:
                with self._get(address) as response:
                    if response.is_redirect:
                        address = urljoin(address, response.headers["Location"])
                        continue
                    _check_headers(response)
                    return self._read(response)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise self._explained(error) from error
        raise Refused("too many redirects")

    def _get(self, address: str) -> requests.Response:
        left = self._seconds_left()
        if left <= 0:
            raise TimeoutError
        timeout = (min(CONNECT_SECONDS, left), min(IDLE_SECONDS, left))
        return self._session.get(address, stream=True, allow_redirects=False, timeout=timeout)

    def _read(self, response: requests.Response) -> bytes:
        body = bytearray()
        if (response.raw.length_remaining or 0) > self.max_bytes:
            raise Refused("too many bytes")
        while chunk := response.raw.read1(2**16, decode_content=False):
            body += chunk
            if len(body) > self.max_bytes:
                raise Refused("too many bytes")
            if self._seconds_left() <= 0:
                raise Refused("too slow")
        return bytes(body)

    def _explained(self, error: Exception) -> Exception:
        slow = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
        if isinstance(error, slow) or self._seconds_left() <= 0:
            return Refused("too slow")
        if isinstance(error, ValueError):
            return Refused("no valid http(s) address")
        if isinstance(error, requests.exceptions.SSLError):
            return Refused("no answer")
        return _Failed("no answer")

    def _seconds_left(self) -> float:
        return self._current.deadline - time.monotonic()

    def _turn(self, host: str) -> Any:
        limit = HOST_LIMITS.get(host, self.per_host)
        with self._turns_lock:
            return self._turns.setdefault(host, threading.Semaphore(limit or 2**20))

    # --- connections -----------------------------------------------------------------------------

    def _guarded_pool(self, pool: type[urllib3.HTTPConnectionPool]) -> type[urllib3.HTTPConnectionPool]:
        """A pool whose connections go to allowed addresses only, and whose replies keep to the deadline."""
        downloader = self

        class Response(http.client.HTTPResponse):
            def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
                super().__init__(sock, *args, **kwargs)
                self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, downloader))

        class Connection(pool.ConnectionCls):
            response_class = Response

            def _new_conn(self) -> socket.socket:
                # Looked up once and then connected to by number: a second look-up could answer differently.
                last_error: Exception | None = None
                for number in downloader._allowed_numbers(self.host, self.port):
                    try:
                        return urllib3.util.connection.create_connection(
                            (number, self.port), self.timeout, socket_options=self.socket_options
                        )
                    except OSError as error:
                        last_error = error
                raise urllib3.exceptions.NewConnectionError(self, f"cannot connect: {last_error}") from last_error

        return type("GuardedPool", (pool,), {"ConnectionCls": Connection})

    def _allowed_numbers(self, host: str, port: int | None) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Refused("no answer") from error
        numbers = list(dict.fromkeys(entry[4][0] for entry in found))
        allowed = [number for number in numbers if is_public(number) or number in self._private_numbers]
        if not allowed:
            raise Refused("inside a private network")
        return allowed

    def _check_before_proxy(self, host: str) -> None:
        # The proxy makes the connection then, and looks names up itself; what can be known here is refused here.
        try:
            self._allowed_numbers(host, None)
        except Refused as refusal:
            if str(refusal) != "no answer":
                raise

    @functools.cached_property
    def _private_numbers(self) -> set[str]:
        numbers = set()
        for host in self.private_hosts:
            try:
                numbers |= {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
            except (OSError, UnicodeError):
                continue
        return numbers


class _Failed(Exception):
    """Something that may be over in a moment; ``wait`` is how many seconds the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _TimedReader(io.RawIOBase):
    """Reads a socket until the deadline of the thread's current download.

    A time-out of the socket alone holds for each read: a server that sends a byte now and then, even of its headers,
    would never run into it.
    """

    def __init__(self, raw: Any, sock: socket.socket, downloader: Downloader) -> None:
        self._raw, self._sock, self._downloader = raw, sock, downloader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        deadline = min(time.monotonic() + IDLE_SECONDS, self._downloader._current.deadline)
        while (left := deadline - time.monotonic()) > 0 and not self._downloader.stopped.is_set():
            # Short waits, so that an interruption by the user is noticed.
            self._sock.settimeout(min(left, 0.5))
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:
                continue
        raise TimeoutError("the read operation timed out")

    def close(self) -> None:
        self._raw.close()
        super().close()


def is_public(number: str) -> bool:
    """Whether an IP address belongs to the public internet, seen through IPv6's ways to write an IPv4 address."""
    address = ipaddress.ip_address(number.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
        address = inner or address
    return address.is_global and not address.is_multicast


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


def _check_headers(response: requests.Response) -> None:
    status = response.status_code
    if status in RETRIED_STATUS:
        wait = response.headers.get("Retry-After", "")
        raise _Failed(f"HTTP status {status}", float(wait) if wait.isascii() and wait.isdigit() else 0.0)
    if status != 200:
        raise Refused(f"HTTP status {status}")
    directives = response.headers.get("X-Robots-Tag", "").lower().replace(",", " ").split()
    if any(directive in OPT_OUT_DIRECTIVES for directive in directives):
        raise Refused("its owner opts out (X-Robots-Tag)")
    # What claims to be an image is seen when it is decoded, and so is an image that claims to be a page.
    if response.headers.get("Content-Type", "").lower().startswith(("video/", "audio/")):
        raise Refused("no image")
