"""Asking an HTTP service that answers in JSON."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.utils import get_auth_from_url

from custom_diffusion.command_line import without_userinfo
from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.addresses import Session, location
from custom_diffusion.retrieval.host_limits import HostLimits, PauseTooLong
from custom_diffusion.retrieval.messages import duration
from custom_diffusion.retrieval.sources import SourceError
from custom_diffusion.text import one_line

# One reply with hundreds of images inside is this long at the most.
MAX_REPLY_BYTES = 2**29

# What may be over in a moment.
RETRIED_STATUS = (429, 502, 503, 504)


class Service:
    """An HTTP service that answers in JSON.

    Args:
        name: for messages.
        url: its base address.
        user_agent: how to introduce oneself.
        interval: seconds between the starts of two requests.
        limits: when its host may be asked, where others ask the same one.
        flags: those that choose this service at another address, which follows them.
        forbidden: what to do where it answers that it is forbidden.

    Raises:
        UserError: for an address that is none.
    """

    ATTEMPTS = 4
    SECONDS = 120.0

    def __init__(
        self,
        name: str,
        url: str,
        user_agent: str,
        interval: float = 0.0,
        limits: HostLimits | None = None,
        flags: str = "--url",
        forbidden: str = "",
    ) -> None:
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"--url {url!r} is no address: {error}") from error
        if parts.scheme not in ("http", "https") or not host:
            raise UserError(f"--url {url!r} is no http(s) address, such as http://localhost:1234")
        self.name = name
        self.host = host
        # User name and password go into a header: messages and origins of images name the address.
        self.url = without_userinfo(url).rstrip("/")
        self.interval = interval
        self.flags = flags
        self.forbidden = forbidden
        self._limits = limits or HostLimits()
        self._next_request = 0.0
        self._session = Session()
        if any(credentials := get_auth_from_url(url)):
            self._session.auth = credentials
        self._session.headers.update({"User-Agent": user_agent, "Accept": "application/json"})

    def get(self, path: str, parameters: dict[str, Any]) -> Any:
        """The reply to a GET request.

        Raises:
            SourceError: where there is none.
        """
        return self._request("GET", path, params=parameters)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The reply to a POST request.

        Raises:
            SourceError: where there is none.
        """
        return self._request("POST", path, json=body)

    def _request(self, method: str, path: str, **content: Any) -> Any:
        for attempt in range(self.ATTEMPTS):
            self._wait_for_turn()
            started = time.monotonic()
            self._next_request = started + self.interval
            try:
                with self._session.request(
                    method, self.url + path, timeout=(10, self.SECONDS), allow_redirects=False, stream=True, **content
                ) as response:
                    self._limits.answered(self.url, response.status_code, response.headers, started)
                    if response.status_code not in RETRIED_STATUS or attempt + 1 == self.ATTEMPTS:
                        return self._reply(response, path)
            except (requests.RequestException, OSError) as error:
                raise SourceError(f"{self.name} at {self.url} does not answer ({_cause(error)})") from error
            if response.status_code in (502, 504):
                time.sleep(2.0**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _wait_for_turn(self) -> None:
        time.sleep(max(0.0, self._next_request - time.monotonic()))
        try:
            self._limits.pause(self.url)
        except PauseTooLong as pause:
            raise SourceError(
                f"{self.name} at {self.url} asks for a pause of {duration(pause.seconds)}: run the same command again "
                "after that"
            ) from pause

    def _reply(self, response: requests.Response, path: str) -> Any:
        status = response.status_code
        if response.is_redirect:
            raise SourceError(self._moved(response, path))
        try:
            reply = json.loads(self._body(response))
        except (ValueError, RecursionError):
            reply = None
        if status == 200 and reply is not None:
            return reply
        if status == 429:
            raise SourceError(f"{self.name} at {self.url} has too many requests: run the same command again later")
        told = told_by(reply)
        what = f"answers with HTTP status {status}" if status != 200 else "answers with something that is not JSON"
        told = f": {told}" if told else ""
        advice = f"; {self.forbidden}" if status == 403 and self.forbidden else ""
        raise SourceError(f"{self.name} at {self.url} {what}{told}{advice}")

    def _moved(self, response: requests.Response, path: str) -> str:
        """What to do about a redirect: the new base address, where it follows from where the request was sent."""
        try:
            target = without_userinfo(urljoin(response.url, location(response)))
        except ValueError:  # something that is no address at all
            target = without_userinfo(location(response))
        base = base_address(target, path)
        if base is None or base == self.url:
            return f"{self.name} at {self.url} redirects {path} to {one_line(target)}: is it the right service?"
        secret = " (with your user name and password in it)" if self._session.auth else ""
        return f"{self.name} at {self.url} has moved: give {self.flags} {shlex.quote(base)} instead{secret}"

    def _body(self, response: requests.Response) -> bytes:
        body, deadline = bytearray(), time.monotonic() + self.SECONDS
        for chunk in response.iter_content(2**16):
            body += chunk
            if len(body) > MAX_REPLY_BYTES or time.monotonic() > deadline:
                raise SourceError(f"{self.name} at {self.url} answers without end")
        return bytes(body)


def base_address(target: str, path: str) -> str | None:
    """The base address of a service, from the address of one of its pages.

    Args:
        target: such as ``https://new.example/api/knn-service?x=1``.
        path: of the page below the base address, such as ``/knn-service``.

    Returns:
        Such as ``https://new.example/api``; None where the target is no such page.
    """
    try:
        parts = urlsplit(target)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return None
    found = parts.path.rstrip("/")
    if parts.scheme not in ("http", "https") or not host or not found.endswith(path.rstrip("/")):
        return None
    base = f"{parts.scheme}://{parts.netloc}{found.removesuffix(path.rstrip('/'))}".rstrip("/")
    return base if base.isprintable() else None


def _cause(error: Exception) -> str:
    if isinstance(error, requests.Timeout):
        return "time-out"
    text = str(error)
    for sign, meaning in (("NameResolution", "unknown host"), ("refused", "connection refused")):
        if sign in text:
            return meaning
    return type(error).__name__


def told_by(reply: Any) -> str:
    """What an error reply says: {"message": ...}, {"detail": ...} or MediaWiki's {"error": {"info": ...}}."""
    if not isinstance(reply, dict):
        return ""
    inner = reply.get("error")
    told = reply.get("message") or reply.get("detail") or (inner.get("info") if isinstance(inner, dict) else inner)
    return one_line(str(told or ""))[:200]
