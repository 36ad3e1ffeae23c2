"""A web for the tests of retrieval: local servers that reply as the real services are documented to, and as the web.

``run`` calls retrieve.py in this process, as starting Python takes longer than most runs.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, urlsplit

from PIL import Image

import retrieve
from custom_diffusion.command_line import run as run_command
from custom_diffusion.images import load_image
from custom_diffusion.retrieval.fingerprints import Fingerprint, difference
from tests.retrieval_images import drawing, encoded, jpeg

SCRIPT = Path(retrieve.__file__)


def bomb():
    """A PNG of a few kilobytes that unfolds to 400 million pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2501) * 20000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Web:
    """A real HTTP server; ``pages`` says what is behind a path: bytes, or a function of the handler."""

    def __init__(self, host="127.0.0.1", certificate=None):
        self.pages = {}
        self.requests = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self):
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlsplit(self.path).path
                web.requests.append((path, parse_qs(urlsplit(self.path).query), dict(self.headers), time.monotonic()))
                page = web.pages.get(path)
                try:
                    if page is None:
                        self.answer(b"gone", "text/plain", 404)
                    elif callable(page):
                        page(self)
                    else:
                        self.answer(page)
                except OSError:
                    pass

            do_GET = do_POST = handle_request

            def answer(self, body, kind="image/jpeg", status=200, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def json(self, content, status=200, **headers):
                self.answer(json.dumps(content).encode(), "application/json", status, **headers)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer((host, 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http{'s' * bool(certificate)}://{host}:{self.server.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()

    def paths(self):
        return [path for path, *_ in self.requests]


def serving(host="127.0.0.1", certificate=None) -> Iterator[Web]:
    """A server for as long as a fixture lasts."""
    server = Web(host, certificate)
    yield server
    server.server.shutdown()
    server.server.server_close()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def endless(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "image/jpeg")
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**16))


def slow_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.2)


def slow_headers(handler):
    while True:
        handler.wfile.write(b"H")
        time.sleep(0.2)


def html(handler):
    handler.answer(b"<html><body>This image is no longer available</body></html>", "text/html")


def redirect(to):
    return lambda handler: handler.answer(b"", status=302, Location=to)


# What a search over the web brings back: 20 good ones among everything else.


# What a search over the web brings back: this many good ones among everything else.
GOOD = 24


def serve_bad_entries(web):
    """All that can be wrong with an entry of a reply."""
    bad = [
        {"url": f"{web.url}/gone.jpg", "caption": "cat"},
        {"url": f"http://127.0.0.1:{free_port()}/refused.jpg", "caption": "cat"},
        {"url": "http://no-such-host.invalid/cat.jpg", "caption": "cat"},
        {"url": f"{web.url}/page.jpg", "caption": "cat"},
        {"url": f"{web.url}/disguised.jpg", "caption": "cat"},
        {"url": f"{web.url}/truncated.jpg", "caption": "cat"},
        {"url": f"{web.url}/endless.jpg", "caption": "cat"},
        {"url": f"{web.url}/slow.jpg", "caption": "cat"},
        {"url": f"{web.url}/slow_headers.jpg", "caption": "cat"},
        {"url": f"{web.url}/bomb.png", "caption": "cat"},
        {"url": f"{web.url}/small.jpg", "caption": "cat"},
        {"url": f"{web.url}/good/0.jpg", "caption": "the same address"},
        {"url": f"{web.url}/again.jpg", "caption": "the same image in another size"},
        {"url": f"{web.url}/loop", "caption": "cat"},
        {"url": f"{web.url}/to_file", "caption": "cat"},
        {"url": f"{web.url}/to_private", "caption": "cat"},
        {"url": "file:///etc/hostname", "caption": "cat"},
        {"url": "ftp://127.0.0.1/cat.jpg", "caption": "cat"},
        {"url": "http://[::1", "caption": "cat"},
        {"url": "http://10.0.0.1/cat.jpg", "caption": "cat"},
        {"url": "http://169.254.169.254/latest/meta-data", "caption": "cat"},
        {"url": "", "caption": None, "image": "no base64!"},
        {"caption": "no image"},
        {},
        "no entry",
        {"url": 7, "caption": 8},
    ]
    web.pages |= {
        "/page.jpg": html,
        "/disguised.jpg": b"<html>an error page that calls itself image/jpeg</html>",
        "/truncated.jpg": encoded(drawing(900))[:-2000],
        "/endless.jpg": endless,
        "/slow.jpg": slow_body,
        "/slow_headers.jpg": slow_headers,
        "/bomb.png": bomb(),
        "/small.jpg": encoded(drawing(901, (200, 300))),
        "/again.jpg": encoded(drawing(0, (280, 262)), quality=60),
        "/loop": redirect("/loop"),
        "/to_file": redirect("file:///etc/hostname"),
        "/to_private": redirect("http://10.0.0.1/cat.jpg"),
    }
    return bad


def serve_mixture(web):
    """A clip-retrieval service whose reply mixes good entries with all that can be wrong."""
    entries = []
    for number in range(GOOD):
        path = f"/good/{number}.jpg"
        web.pages[path] = encoded(drawing(number), quality=90)
        entries.append({"url": web.url + path, "caption": f"cat number {number}"})
    web.pages["/good/3.jpg"] = encoded(drawing(3), "PNG")
    web.pages["/good/4.jpg"] = encoded(drawing(4), "WEBP")
    web.pages["/good/6.jpg"] = encoded(drawing(6).quantize(), "GIF")
    entries[1]["caption"] = "cat\nnumber\r\n1"
    entries[2]["caption"] = "cat\u2028number\u0085\x0b2\x00"
    entries[5]["caption"] = "cat number 5 \ud800"
    entries[7] = {"url": None, "caption": "cat number 7", "image": base64.b64encode(encoded(drawing(7))).decode()}
    web.pages["/moved"] = redirect("/good/8.jpg")
    entries[8]["url"] = web.url + "/moved"
    bad = serve_bad_entries(web)
    random.Random(0).shuffle(bad)
    for place, entry in enumerate(bad):
        entries.insert(min(2 * place + 1, len(entries)), entry)
    entries = [entry | {"id": row, "similarity": 0.3} if isinstance(entry, dict) else entry
               for row, entry in enumerate(entries)]  # fmt: skip
    web.asked = []

    def knn(handler):
        query = json.loads(handler.body)
        web.asked.append(query)
        handler.json(entries[: query["num_images"]])

    web.pages["/knn-service"] = knn
    web.pages["/indices-list"] = lambda handler: handler.json(["laion", "mine"])
    return entries


def serve_good(web, number, seconds=0.0):
    """A clip-retrieval service with nothing wrong."""

    def page(body):
        return lambda handler: (time.sleep(seconds), handler.answer(body))

    for row in range(number):
        web.pages[f"/good/{row}.jpg"] = page(encoded(drawing(row)))
    entries = [{"url": f"{web.url}/good/{row}.jpg", "caption": f"cat number {row}", "id": row} for row in range(number)]
    web.pages["/knn-service"] = lambda handler: handler.json(entries[: json.loads(handler.body)["num_images"]])
    web.pages["/indices-list"] = lambda handler: handler.json(["laion"])


def serve_openverse(web, pages=2, per_page=20):
    """Replies in the form of https://api.openverse.org/v1/#tag/images/operation/images_search."""

    def search(handler):
        query = parse_qs(urlsplit(handler.path).query)
        page = int(query["page"][0])
        rows = range((page - 1) * per_page, page * per_page)
        results = [
            {
                "id": f"id-{row}",
                "title": f"Cat {row} in the garden",
                "foreign_landing_url": f"https://www.flickr.com/photos/someone/{row}",
                "url": f"{web.url}/photos/{row}.jpg",
                "creator": "Someone\nElse",
                "creator_url": "https://www.flickr.com/photos/someone",
                "license": "by",
                "license_version": "2.0",
                "license_url": "https://creativecommons.org/licenses/by/2.0/",
                "provider": "flickr",
                "attribution": f'"Cat {row}" by Someone is licensed under CC BY 2.0.',
                "height": 300,
                "width": 320,
                "mature": False,
            }
            for row in rows
        ]
        handler.json(
            {"result_count": pages * per_page, "page_count": pages, "page_size": per_page, "page": page,
             "results": results}
        )  # fmt: skip

    web.pages["/v1/images/"] = search
    for row in range(pages * per_page):
        web.pages[f"/photos/{row}.jpg"] = jpeg(row)


def serve_wikimedia(web, number=6, per_page=3):
    """Replies in the form of https://www.mediawiki.org/wiki/API:Search and API:Imageinfo (formatversion 2)."""

    def search(handler):
        query = parse_qs(urlsplit(handler.path).query)
        offset = int(query.get("gsroffset", ["0"])[0])
        pages = [
            {
                "pageid": row,
                "ns": 6,
                "title": f"File:IMG {row}.jpg",
                "index": row + 1,
                "imagerepository": "local",
                "imageinfo": [
                    {
                        "size": 1000,
                        "width": 4000 if row == 0 else 320,
                        "height": 3000,
                        "thumburl": f"{web.url}/thumb/{row}.jpg",
                        "url": f"{web.url}/full/{row}.jpg",
                        "descriptionurl": f"https://commons.wikimedia.org/wiki/File:IMG_{row}.jpg",
                        "extmetadata": {
                            "ImageDescription": {"value": f"<p>A <b>tabby</b> cat &amp; friend {row}</p>"},
                            "Artist": {"value": '<a href="//x">Someone</a>'},
                            "LicenseShortName": {"value": "CC BY-SA 4.0"},
                            "LicenseUrl": {"value": "https://creativecommons.org/licenses/by-sa/4.0"},
                        },
                    }
                ],
            }
            for row in range(offset, min(offset + per_page, number))
        ]
        # The API gives pages in the order of their ids, and the rank in "index".
        reply = {"batchcomplete": True, "query": {"pages": pages[::-1]}}
        if offset + per_page < number:
            reply["continue"] = {"gsroffset": offset + per_page, "continue": "gsroffset||"}
        handler.json(reply)

    web.pages["/w/api.php"] = search
    for row in range(number):
        web.pages[f"/full/{row}.jpg"] = jpeg(100 + row)
    web.pages["/thumb/0.jpg"] = jpeg(100)
    web.pages["/full/0.jpg"] = None


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(folder, *arguments, **environment):
    """Run retrieve.py in a folder as a command; gives its exit code and what it printed."""
    out, err, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    code: object = 0
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_command(lambda: retrieve.main(list(map(str, arguments))))
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=err)
                code = 1
        finally:
            signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_process(folder, *arguments, **environment):
    """The same in a process of its own."""
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def left_out(result):
    """The table of reasons."""
    return {reason: int(number) for number, reason in re.findall(r"^ +(\d+)  (.+)$", result.stdout, re.MULTILINE)}


def lines(path):
    return path.read_bytes().decode().removesuffix("\n").split("\n")


def lists(folder):
    captions, urls, images = (lines(folder / name) for name in ("caption.txt", "urls.txt", "images.txt"))
    assert len(captions) == len(urls) == len(images)
    return captions, urls, images


def check_mixture(folder, number):
    """The right, different, whole images, each beside its own caption."""
    captions, urls, images = lists(folder)
    assert len(images) == len(set(images)) == len(set(urls)) == number
    assert sorted(path.name for path in (folder / "images").iterdir()) == sorted(Path(image).name for image in images)
    shown = []
    for caption, image in zip(captions, images, strict=True):
        shown.append(int(re.fullmatch(r"cat number (\d+)", caption)[1]))
        path = folder.parent.parent / image
        with Image.open(path) as opened:
            assert opened.format == "JPEG" and path.suffix == ".jpg"
        found, right = Fingerprint.of(load_image(path)), Fingerprint.of(drawing(shown[-1]))
        # One of them was reduced to a palette, which changes more than saving again; others differ by 10 and more.
        assert difference(found, right) <= 3, caption
    assert len(set(shown)) == number


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "contact_sheet.jpg"
    }
