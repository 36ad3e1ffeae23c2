"""Asking an HTTP service that answers in JSON."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.utils import get_auth_from_url

from custom_diffusion.command_line import without_userinfo
from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.sources import SourceError
from custom_diffusion.text import one_line

# One reply with hundreds of images inside is this long at the most.
MAX_REPLY_BYTES = 2**29


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
        told = told_by(reply)
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


def told_by(reply: Any) -> str:
    """What an error reply says: {"message": ...}, {"detail": ...} or MediaWiki's {"error": {"info": ...}}."""
    if not isinstance(reply, dict):
        return ""
    inner = reply.get("error")
    told = reply.get("message") or reply.get("detail") or (inner.get("info") if isinstance(inner, dict) else inner)
    return one_line(str(told or ""))[:200]
