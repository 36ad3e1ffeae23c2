"""Connections to strangers: only to public addresses, and never for longer than the thread's deadline.

A search reply may hold any address, also one inside the user's own network, and a server may send a byte now and then
for ever. The session of this module refuses the first and ends the second.
"""

from __future__ import annotations

import functools
import http.client
import http.cookiejar
import io
import ipaddress
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from custom_diffusion.retrieval.addresses import Session
from custom_diffusion.retrieval.sources import Refused

# A server that sends nothing for this many seconds will not send anything.
IDLE_SECONDS = 10.0


class Deadline(threading.local):
    """When the current thread's download has to be over, in seconds of ``time.monotonic``."""

    at = 0.0

    def seconds_left(self) -> float:
        """Seconds until then; negative when it is over."""
        return self.at - time.monotonic()


class AddressGuard:
    """Which addresses may be asked.

    Args:
        private_hosts: host names or addresses inside a private network that may be asked all the same.
    """

    def __init__(self, private_hosts: Iterable[str] = ()) -> None:
        self.private_hosts = tuple(private_hosts)

    def allowed_numbers(self, host: str, port: int | None) -> list[str]:
        """The IP addresses of a host that may be asked.

        Raises:
            Refused: where there are none.
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Refused("no answer") from error
        numbers = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        allowed = [number for number in numbers if is_public(number) or number in self._private_numbers]
        if not allowed:
            raise Refused("inside a private network")
        return allowed

    def check_before_proxy(self, host: str) -> None:
        """Refuse what is known to be private: the proxy makes the connection, and looks names up itself.

        Raises:
            Refused: for private addresses.
        """
        try:
            self.allowed_numbers(host, None)
        except Refused as refusal:
            if str(refusal) != "no answer":
                raise

    @functools.cached_property
    def _private_numbers(self) -> set[str]:
        numbers: set[str] = set()
        for host in self.private_hosts:
            try:
                numbers |= {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
            except (OSError, UnicodeError):
                continue
        return numbers


def guarded_session(
    user_agent: str, guard: AddressGuard, deadline: Deadline, stopped: threading.Event
) -> requests.Session:
    """A session for downloads by strangers; safe to use from several threads.

    Args:
        user_agent: how to introduce oneself.
        guard: which addresses may be asked.
        deadline: of each thread's current download.
        stopped: lets all reads fail soon.
    """
    session = Session()
    # Compressed bodies would be one more way to send a bomb, and images are compressed already.
    session.headers.update({"User-Agent": user_agent, "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"})
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    adapter = HTTPAdapter(pool_connections=64, pool_maxsize=64)
    adapter.poolmanager.pool_classes_by_scheme = {
        "http": _guarded_pool(urllib3.HTTPConnectionPool, guard, deadline, stopped),
        "https": _guarded_pool(urllib3.HTTPSConnectionPool, guard, deadline, stopped),
    }
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _guarded_pool(
    pool: type[urllib3.HTTPConnectionPool], guard: AddressGuard, deadline: Deadline, stopped: threading.Event
) -> type[urllib3.HTTPConnectionPool]:
    """A pool whose connections go to allowed addresses only, and whose replies keep to the deadline."""

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline, stopped))

    class Connection(pool.ConnectionCls):  # type: ignore[name-defined]  # the class is an attribute of the pool
        response_class = Response

        def _new_conn(self) -> socket.socket:
            # Looked up once and then connected to by number: a second look-up could answer differently.
            last_error: Exception | None = None
            for number in guard.allowed_numbers(self.host, self.port):
                try:
                    return urllib3.util.connection.create_connection(
                        (number, self.port), self.timeout, socket_options=self.socket_options
                    )
                except OSError as error:
                    last_error = error
            raise urllib3.exceptions.NewConnectionError(self, f"cannot connect: {last_error}") from last_error

    return type("GuardedPool", (pool,), {"ConnectionCls": Connection})


class _TimedReader(io.RawIOBase):
    """Reads a socket until the deadline of the thread's current download.

    A time-out of the socket alone holds for each read: a server that sends a byte now and then, even of its headers,
    would never run into it.
    """

    def __init__(self, raw: Any, sock: socket.socket, deadline: Deadline, stopped: threading.Event) -> None:
        self._raw, self._sock, self._deadline, self._stopped = raw, sock, deadline, stopped

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(time.monotonic() + IDLE_SECONDS, self._deadline.at)
        while (left := end - time.monotonic()) > 0 and not self._stopped.is_set():
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
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    return address.is_global and not address.is_multicast
