"""Web addresses in replies of servers."""

from __future__ import annotations

import urllib.parse

import requests


class Session(requests.Session):
    """A session that leaves redirects alone: whoever asks looks at each address before it is asked."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: requests reads the address even where it must not follow it, and fails where it cannot."""


def location(response: requests.Response) -> str:
    """Where a reply redirects to, as an address that can be asked.

    Many servers send other letters than ASCII as they are. Headers are read as Latin-1, whatever they are in: where
    the bytes are UTF-8, they are read again as that, and otherwise each keeps its own value, as browsers do it.
    """
    text = response.headers["Location"].strip()
    try:
        data = text.encode("latin-1")
    except UnicodeEncodeError:
        return text
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return urllib.parse.quote(data, safe="!#$%&'()*+,/:;=?@[]~")
