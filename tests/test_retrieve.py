"""retrieve.py against local servers that reply as the real services are documented to, and as the web really does."""

import base64
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

import retrieve
from custom_diffusion.command_line import save_config
from custom_diffusion.data.images import find_class_images
from custom_diffusion.images import load_image
from custom_diffusion.retrieval import class_folder
from custom_diffusion.retrieval.download import Downloader, Refused, is_public
from custom_diffusion.retrieval.own_files import LocalFiles
from custom_diffusion.retrieval.words import caption_of_title, has_words, query_words
from custom_diffusion.text import one_line

SCRIPT = Path(retrieve.__file__)


# --- images and servers ------------------------------------------------------------------------


def drawing(number, size=(320, 300)):
    """An image that no other number gives."""
    cells = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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


@pytest.fixture
def web():
    server = Web()
    yield server
    server.server.shutdown()


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
GOOD = 24


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


# --- running retrieve.py -------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(folder, *arguments, **environment):
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


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
        bits = class_folder.fingerprint(load_image(path)) ^ class_folder.fingerprint(drawing(shown[-1]))
        assert bits.bit_count() < 16, caption
    assert len(set(shown)) == number


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "contact_sheet.jpg"
    }


def test_a_reply_with_everything_that_can_be_wrong(web, tmp_path):
    serve_mixture(web)
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--num_class_images", 20, "--timeout", 3)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "real_reg/samples_cat"
    check_mixture(folder, 20)
    with Image.open(folder / "contact_sheet.jpg") as sheet:
        assert sheet.size == (1280, 256)
    assert "clip-retrieval service at" in result.stdout.splitlines()[0]
    # A JPEG of a good size is kept byte for byte.
    assert (tmp_path / lists(folder)[2][0]).read_bytes() == web.pages["/good/0.jpg"]


def test_fewer_than_asked_keeps_them_and_tells_why(web, tmp_path):
    serve_mixture(web)
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--num_class_images", 30, "--timeout", 2)
    assert result.returncode == 1
    check_mixture(tmp_path / "real_reg/samples_cat", GOOD)
    assert result.stderr.splitlines()[-1].startswith(f"error: {GOOD} of the 30 images of 'cat' found")
    assert {reason: int(number) for number, reason in re.findall(r"^ +(\d+)  (.+)$", result.stdout, re.MULTILINE)} == {
        "HTTP status 404": 1,
        "no answer": 2,
        "no image": 2,
        "broken image": 1,
        "too many bytes": 1,
        "too slow": 2,
        "too many pixels": 1,
        "too small": 1,
        "the same address again": 1,
        "near-duplicate": 1,
        "too many redirects": 1,
        "no valid http(s) address": 4,
        "inside a private network": 3,
        "neither address nor image": 5,
    }


@pytest.mark.long
def test_killed_ten_times_gives_what_an_uninterrupted_run_gives(web, tmp_path):
    serve_mixture(web)
    for number in range(GOOD):
        page = web.pages[f"/good/{number}.jpg"]
        web.pages[f"/good/{number}.jpg"] = lambda handler, page=page: (time.sleep(0.1), handler.answer(page))
    arguments = ["--class_prompt", "cat", "--url", web.url, "--num_class_images", 20, "--timeout", 1]
    arguments += ["--connections", 4]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole", *arguments).returncode == 0
    moments = random.Random(1)
    folder = tmp_path / "killed/real_reg/samples_cat"
    counts = []
    for _ in range(10):
        process = subprocess.Popen(
            command(*arguments), cwd=tmp_path / "killed", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.3, 1.2))
        process.kill()
        process.wait()
        images = list((folder / "images").glob("*.jpg"))
        for image in images:
            load_image(image)
        counts.append(len(images))
    assert counts == sorted(counts) and counts[0] < 20
    result = run(tmp_path / "killed", *arguments)
    assert result.returncode == 0, result.stderr
    check_mixture(folder, 20)
    assert tree(folder) == tree(tmp_path / "whole/real_reg/samples_cat")


KILLED_AT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import retrieve
from retrieval import class_folder

left = {steps}

def step():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, details):
    changes = event in ("os.rename", "os.remove") or event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)
    if changes and "cats" in str(details[0]):
        step()

def before_line(record, as_line=class_folder._as_line):
    step()
    return as_line(record)

# Whatever is opened for writing, renamed or removed in the folder is a step, and so is each line of sources.jsonl.
sys.addaudithook(watch)
class_folder._as_line = before_line
retrieve.main({arguments!r})
"""


def test_killed_at_every_step_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "mine").mkdir()
    for row in range(2):
        (tmp_path / f"mine/{row}.jpg").write_bytes(web_page(row))
        (tmp_path / f"mine/{row}.txt").write_text(f"cat number {row}")
    arguments = ["--class_prompt", "cat", "--path", "mine", "--num_class_images", "2", "--class_data_dir"]
    retrieve.main([*arguments, "whole"])
    whole = tree(tmp_path / "whole")
    for steps in range(100):
        shutil.rmtree(tmp_path / "cats", ignore_errors=True)
        driver = KILLED_AT.format(root=str(SCRIPT.parent), steps=steps, arguments=[*arguments, "cats"])
        killed = subprocess.run([sys.executable, "-c", driver], cwd=tmp_path, capture_output=True)
        present = sorted((tmp_path / "cats/images").glob("*.jpg"))
        assert [path.read_bytes() for path in present] == [web_page(0), web_page(1)][: len(present)]
        retrieve.main([*arguments, "cats"])
        found = {
            name: re.sub(rb"cats(?=[/\n])", b"whole", content) for name, content in tree(tmp_path / "cats").items()
        }
        assert found == whole, f"killed before step {steps}"
        if killed.returncode == 0:
            break
    assert 8 < steps < 99


@pytest.mark.parametrize("rest", [0, 1, 40, -1])
def test_a_line_that_was_cut_short_is_written_again(tmp_path, rest):
    (tmp_path / "mine").mkdir()
    for row in range(3):
        (tmp_path / f"mine/cat{row}.jpg").write_bytes(web_page(row))
    arguments = ["--class_prompt", "cat", "--path", "mine", "--num_class_images", "3", "--class_data_dir", "cats"]
    assert run(tmp_path, *arguments).returncode == 0
    whole = tree(tmp_path / "cats")
    before, last, _ = whole["sources.jsonl"].rsplit(b"\n", 2)
    # What a run leaves that is killed while it writes the last line.
    (tmp_path / "cats/sources.jsonl").write_bytes(before + b"\n" + last[: rest if rest >= 0 else len(last)])
    (tmp_path / "cats/images/2.jpg").rename(tmp_path / "cats/images/.2.jpg.part")
    assert run(tmp_path, *arguments).returncode == 0
    assert tree(tmp_path / "cats") == whole


def test_interrupted_politely_it_leaves_lists_and_goes_on(web, tmp_path):
    serve_good(web, 40, seconds=0.15)
    arguments = ["--class_prompt", "cat", "--url", web.url, "--num_class_images", 40, "--connections", 2]
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "real_reg/samples_cat"
    while len(list(folder.glob("images/*.jpg"))) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and "Traceback" not in errors and "continues from there" in errors
    found = len(lists(folder)[0])
    assert 5 <= found < 40
    assert not list(folder.glob("images/.*"))
    asked = len([path for path in web.paths() if path.startswith("/good")])
    assert run(tmp_path, *arguments).returncode == 0
    assert len(lists(folder)[0]) == 40
    assert len([path for path in web.paths() if path.startswith("/good")]) - asked <= 40 - found


def serve_good(web, number, seconds=0.0):
    """A clip-retrieval service with nothing wrong."""

    def page(body):
        return lambda handler: (time.sleep(seconds), handler.answer(body))

    for row in range(number):
        web.pages[f"/good/{row}.jpg"] = page(encoded(drawing(row)))
    entries = [{"url": f"{web.url}/good/{row}.jpg", "caption": f"cat number {row}", "id": row} for row in range(number)]
    web.pages["/knn-service"] = lambda handler: handler.json(entries[: json.loads(handler.body)["num_images"]])
    web.pages["/indices-list"] = lambda handler: handler.json(["laion"])


def test_finished_it_does_nothing_and_says_so(web, tmp_path):
    serve_good(web, 5)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 5, "--url", web.url]
    assert run(tmp_path, *arguments).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cats").rglob("*") if path.is_file()}
    web.requests.clear()
    result = run(tmp_path, *arguments)
    assert result.returncode == 0 and "finished already: 5 images of 'cat'" in result.stdout
    assert not web.requests
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cats").rglob("*") if path.is_file()}
    # Even where no service answers any more.
    assert run(tmp_path, *arguments[:-1], f"http://127.0.0.1:{free_port()}").returncode == 0


def test_training_reads_the_result(web, tmp_path):
    serve_good(web, 5)
    folder = tmp_path / "cats"
    run(tmp_path, "--class_prompt", "cat", "--class_data_dir", folder, "--num_class_images", 5, "--url", web.url)
    concept = {"class_prompt": "cat", "class_data_dir": str(folder)}
    pairs = find_class_images([concept], 5, real_prior=True)
    assert pairs == [(folder / f"images/{row}.jpg", f"cat number {row}") for row in range(5)]


def test_deleted_images_are_replaced_by_others(web, tmp_path):
    serve_good(web, 9)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 5, "--url", web.url]
    run(tmp_path, *arguments)
    (tmp_path / "cats/images/1.jpg").unlink()
    (tmp_path / "cats/images/4.jpg").unlink()
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    captions, _, images = lists(tmp_path / "cats")
    assert captions == [f"cat number {row}" for row in (0, 2, 3, 5, 6)]
    assert images == [f"cats/images/{row}.jpg" for row in (0, 2, 3, 5, 6)]


def test_what_the_example_has_retrieved_is_taken_over(web, tmp_path):
    serve_good(web, 8)
    folder = tmp_path / "cats"
    (folder / "images").mkdir(parents=True)
    for row in range(3):
        (folder / f"images/{row}.jpg").write_bytes(web_page(row) if row != 1 else b"<html>not found</html>")
    (folder / "images/3.jpg").write_bytes(b"on no list")
    (folder / "caption.txt").write_text("old 0\nold 1\nold 2\n")
    (folder / "urls.txt").write_text("".join(f"{web.url}/good/{row}.jpg\n" for row in range(3)))
    (folder / "images.txt").write_text("".join(f"elsewhere/cats/images/{row}.jpg\n" for row in range(3)))
    run(tmp_path, "--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 5, "--url", web.url)
    captions, _, images = lists(folder)
    assert captions == ["old 0", "old 2", "cat number 1", "cat number 3", "cat number 4"]
    assert (folder / "images/1.jpg").read_bytes() == b"<html>not found</html>"
    assert (folder / "images/3.jpg").read_bytes() == b"on no list"
    assert all(load_image(tmp_path / image) for image in images)


def web_page(row):
    return encoded(drawing(row))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images/a.jpg": b"mine"}, "missing or do not belong together"),
        ({"images.txt": b"a\nb\n", "urls.txt": b"a\n", "caption.txt": b"a\n"}, "missing or do not belong together"),
        ({"sources.jsonl": b'{"file": "../../x.jpg"}\n'}, "line 1 is broken"),
        ({"images": b"a file"}, "cannot be written to"),
        ({"config.yaml": b"class_prompt: cat  # mine\n"}, "'cats/config.yaml' would be replaced"),
        (
            {"sources.jsonl": b'{"file":"0.jpg","caption":"","url":"","class_prompt":"dog","fingerprint":"0"}\n'},
            "holds images of 'dog'",
        ),
    ],
)
def test_foreign_folders_are_left_alone(web, tmp_path, content, message):
    serve_good(web, 3)
    folder = tmp_path / "cats"
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    result = run(tmp_path, "--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert {name: (folder / name).read_bytes() for name in content} == content
    assert not web.requests


def test_two_runs_do_not_share_a_folder(web, tmp_path):
    serve_good(web, 3, seconds=2)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 3, "--url", web.url]
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "/good/0.jpg" not in web.paths():
        time.sleep(0.02)
    result = run(tmp_path, *arguments)
    assert result.returncode == 1 and "another run is filling 'cats'" in result.stderr
    assert process.wait(timeout=20) == 0
    assert len(lines(tmp_path / "cats/sources.jsonl")) == 3


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "mine").mkdir()
    for row in range(3):
        # The last one is the largest.
        (tmp_path / f"mine/cat{row}.jpg").write_bytes(encoded(drawing(row), quality=30 + 30 * row))
    limit = (tmp_path / "mine/cat2.jpg").stat().st_size - 1
    arguments = ["--class_prompt", "cat", "--path", "mine", "--num_class_images", "3", "--class_data_dir", "cats"]
    # A limit on the size of files stands for a full disk.
    result = subprocess.run(
        command(*arguments), cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 'cats' cannot be written to: ")
    assert len(lists(tmp_path / "cats")[0]) == 2
    assert run(tmp_path, *arguments).returncode == 0
    check = [load_image(tmp_path / image).size for image in lists(tmp_path / "cats")[2]]
    assert check == [(320, 300)] * 3


def test_several_classes_from_a_concepts_file(web, tmp_path):
    for row in range(4):
        web.pages[f"/{row}.jpg"] = encoded(drawing(row))

    def knn(handler):
        first = 2 if json.loads(handler.body)["text"] == "wooden pot" else 0
        handler.json([{"url": f"{web.url}/{row}.jpg", "id": row} for row in (first, first + 1)])

    web.pages["/knn-service"] = knn
    concepts = [
        {"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "class_data_dir": "./real/cat"},
        {"class_prompt": "wooden pot"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(concepts))
    result = run(tmp_path, "--concepts_list", "list.json", "--num_class_images", 2, "--url", web.url)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "real/cat/config.yaml").read_text().startswith("num_class_images: 2\nconcepts_list: list.json\n")
    assert lists(tmp_path / "real/cat")[0] == ["cat", "cat"]
    assert lists(tmp_path / "real_reg/samples_wooden_pot")[1] == [f"{web.url}/2.jpg", f"{web.url}/3.jpg"]


# --- --config ------------------------------------------------------------------------------------


def test_a_run_is_repeated_by_the_file_it_leaves(web, tmp_path):
    serve_good(web, 6)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 4, "--url", web.url]
    arguments += ["--max_size", 260, "--private_host", "one.example", "--private_host", "two.example"]
    arguments += ["--deduplicate", "False", "--contact", "me@example.org"]
    assert run(tmp_path, *arguments).returncode == 0
    whole = tree(tmp_path / "cats")
    (tmp_path / "again").mkdir()
    result = run(tmp_path / "again", "--config", tmp_path / "cats/config.yaml")
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "again/cats") == whole
    # In place, where all else was removed, too.
    for name in whole.keys() - {"config.yaml"}:
        (tmp_path / "cats" / name).unlink()
    assert run(tmp_path, "--config", "cats/config.yaml").returncode == 0
    assert tree(tmp_path / "cats") == whole
    result = run(tmp_path, "--config", "cats/config.yaml", "--class_data_dir", "two", "--num_class_images", 2)
    assert result.returncode == 0 and len(lists(tmp_path / "two")[0]) == 2, "the command line wins"


def test_the_file_has_every_flag_but_no_secret(tmp_path):
    told = ["--class_prompt", "cat", "--url", "https://me:pass@localhost:1", "--contact", "me@example.org"]
    for more in ([], ["--private_host", "a", "--private_host", "b", "--deduplicate=False", "--aesthetic_score=3"]):
        args = retrieve.parse_args([*told, *more])
        save_config(args, tmp_path / "config.yaml")
        text = (tmp_path / "config.yaml").read_text()
        assert "pass" not in text and "example.org" not in text
        again = retrieve.parse_args(["--config", str(tmp_path / "config.yaml")])
        different = {name: getattr(again, name) for name, value in vars(args).items() if getattr(again, name) != value}
        config = str(tmp_path / "config.yaml")
        assert different == {"url": "https://localhost:1", "contact": "", "config": config}


def test_a_password_goes_to_the_service_and_nowhere_else(web, tmp_path):
    asked = []

    def knn(handler):
        asked.append(handler.headers["Authorization"])
        entries = [{"id": row, "image": base64.b64encode(encoded(drawing(row))).decode()} for row in range(2)]
        handler.json(entries)

    web.pages["/knn-service"] = knn
    url = web.url.replace("//", "//me:p%40ss@")
    result = run(tmp_path, "--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 2, "--url", url)
    assert result.returncode == 0, result.stderr
    assert set(asked) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}
    everything = b"".join(tree(tmp_path / "cats").values()) + result.stdout.encode() + result.stderr.encode()
    assert b"p%40ss" not in everything and b"p@ss" not in everything


def test_nobody_takes_the_file_for_an_image_or_a_list(web, tmp_path):
    serve_good(web, 5)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 3, "--url", web.url]
    assert run(tmp_path, *arguments).returncode == 0
    saved = (tmp_path / "cats/config.yaml").read_bytes()
    # As a folder that the example has filled, which is told from a foreign one by what is in it.
    (tmp_path / "cats/sources.jsonl").unlink()
    arguments[5] = 4
    assert run(tmp_path, *arguments).returncode == 0
    assert lists(tmp_path / "cats")[0] == [f"cat number {row}" for row in range(4)]
    assert (tmp_path / "cats/config.yaml").read_bytes() == saved.replace(b"images: 3", b"images: 4")
    # As images of one's own.
    result = run(tmp_path, "--class_prompt", "cat", "--path", "cats", "--words", "", "--class_data_dir", "copy")
    assert result.returncode == 1 and "4 of the 200 images" in result.stderr
    # As class images of training.
    concept = {"class_prompt": "cat", "class_data_dir": str(tmp_path / "cats")}
    assert [path.suffix for path, _ in find_class_images([concept], 4, real_prior=True)] == [".jpg"] * 4


def test_a_run_that_finds_nothing_leaves_no_file(web, tmp_path):
    serve_good(web, 0)
    assert run(tmp_path, "--class_prompt", "cat", "--url", web.url).returncode == 1
    assert not list(tmp_path.iterdir())


# --- the clip-retrieval protocol -----------------------------------------------------------------


def test_the_query_is_what_clip_retrieval_expects(web, tmp_path):
    serve_mixture(web)
    run(
        tmp_path, "--class_prompt", "cat", "--url", web.url + "/knn-service/", "--num_class_images", 4, "--timeout", 2,
        "--indice_name", "mine", "--modality", "text", "--aesthetic_weight", 0.5, "--deduplicate", "False",
    )  # fmt: skip
    assert web.asked[0] == {
        "text": "cat",
        "modality": "text",
        "num_images": 16,
        "num_result_ids": 16,
        "indice_name": "mine",
        "use_mclip": False,
        "deduplicate": False,
        "use_safety_model": True,
        "use_violence_detector": True,
        "aesthetic_score": 9,
        "aesthetic_weight": 0.5,
    }


def test_a_short_answer_is_no_reason_to_give_up(web, tmp_path):
    serve_good(web, 40)
    entries = [{"url": f"{web.url}/good/{row}.jpg", "id": row} for row in range(40)]
    # Deduplication in the service: half of what was asked for.
    web.pages["/knn-service"] = lambda handler: handler.json(entries[: json.loads(handler.body)["num_images"] // 2])
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--num_class_images", 30)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda handler: handler.json({"message": "Internal Server Error"}, 500), "500: Internal Server Error"),
        (lambda handler: handler.json({"message": "no such index"}), "answers: no such index"),
        (lambda handler: handler.answer(b"<html>oops</html>", "text/html"), "something that is not JSON"),
        (lambda handler: handler.answer(b"<html>oops</html>", "text/html", 500), "HTTP status 500"),
        (redirect("https://elsewhere.example/knn-service"), "has moved: give --url https://elsewhere.example"),
        (None, "HTTP status 404"),
    ],
)
def test_a_service_in_trouble_is_one_clear_line(web, tmp_path, reply, message):
    web.pages["/knn-service"] = reply
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1] and web.url in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "real_reg").exists()


def test_a_dead_service_is_one_clear_line(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    result = run(tmp_path, "--class_prompt", "cat", "--url", url)
    assert result.returncode == 1
    error = f"error: the clip-retrieval service at {url} does not answer (connection refused)"
    assert result.stderr == error + "\n"
    assert not list(tmp_path.iterdir())


def test_an_unknown_index_is_named_with_those_that_are_there(web, tmp_path):
    serve_mixture(web)
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--indice_name", "laion_400m")
    assert result.returncode == 1 and "no index 'laion_400m', but: laion, mine" in result.stderr


# --- downloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "public"),
    [
        ("93.184.215.14", True), ("2606:2800:21f::1", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("192.168.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
        ("224.0.0.1", False), ("::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("64:ff9b::5db8:d70e", True),
    ],
)  # fmt: skip
def test_which_addresses_are_public(number, public):
    assert is_public(number) is public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1"])
def test_no_request_goes_to_the_own_machine(web, host):
    web.pages["/cat.jpg"] = web_page(0)
    port = urlsplit(web.url).port
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test").fetch(f"http://{host}:{port}/cat.jpg")
    assert not web.requests
    assert Downloader("test", private_hosts=["127.0.0.1"]).fetch(f"{web.url}/cat.jpg") == web_page(0)


def test_no_redirect_leads_to_another_private_address(web):
    try:
        inner = Web("127.0.0.2")
    except OSError:
        pytest.skip("127.0.0.2 is no address of this system")
    inner.pages["/secret"] = web_page(0)
    web.pages["/cat.jpg"] = redirect(f"{inner.url}/secret")
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test", private_hosts=["127.0.0.1"]).fetch(f"{web.url}/cat.jpg")
    assert not inner.requests
    assert Downloader("test", private_hosts=["127.0.0.1", "127.0.0.2"]).fetch(f"{web.url}/cat.jpg") == web_page(0)
    inner.server.shutdown()


def test_behind_a_proxy_private_addresses_are_refused_too(web, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test").fetch("http://10.0.0.1/cat.jpg")
    assert not web.requests


def test_passing_failures_are_tried_again(web):
    replies = iter([503, 429])

    def page(handler):
        status = next(replies, None)
        if status:
            handler.answer(b"", status=status, Retry_After="1")
        else:
            handler.answer(web_page(0))

    web.pages["/cat.jpg"] = page
    downloader = Downloader("test", private_hosts=["127.0.0.1"])
    assert downloader.fetch(f"{web.url}/cat.jpg") == web_page(0)
    times = [at for *_, at in web.requests]
    assert len(times) == 3 and times[1] - times[0] >= 1


def test_owners_who_opt_out_are_heeded(web):
    web.pages["/cat.jpg"] = lambda handler: handler.answer(web_page(0), X_Robots_Tag="noai, noimageai")
    with pytest.raises(Refused, match="opts out"):
        Downloader("test", private_hosts=["127.0.0.1"]).fetch(f"{web.url}/cat.jpg")


def test_encrypted_connections_are_guarded_and_timed_as_well(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("a certificate is made with openssl")
    certificate = tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", certificate, "-out", tmp_path / "public"],
        check=True, capture_output=True,
    )  # fmt: skip
    public = (tmp_path / "public").read_bytes()
    certificate.write_bytes(certificate.read_bytes() + public)
    web = Web(certificate=certificate)
    web.pages |= {"/cat.jpg": web_page(0), "/slow.jpg": slow_body, "/headers.jpg": slow_headers}
    downloader = Downloader("test", seconds=1, private_hosts=["127.0.0.1"])
    with pytest.raises(Refused, match="no answer"):  # an unknown certificate
        downloader.fetch(f"{web.url}/cat.jpg")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "public"))
    assert downloader.fetch(f"{web.url}/cat.jpg") == web_page(0)
    assert downloader.fetch(f"{web.url.replace('127.0.0.1', 'localhost')}/cat.jpg") == web_page(0)
    for page in ("slow", "headers"):
        start = time.monotonic()
        with pytest.raises(Refused, match="too slow"):
            downloader.fetch(f"{web.url}/{page}.jpg")
        assert time.monotonic() - start < 3
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test").fetch(f"{web.url}/cat.jpg")
    web.server.shutdown()


def test_connections_to_one_host_are_bounded(web):
    at_once, most, lock = 0, 0, threading.Lock()

    def page(handler):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        handler.answer(b"x")

    web.pages["/cat.jpg"] = page
    downloader = Downloader("test", private_hosts=["127.0.0.1"], per_host=3)
    threads = [threading.Thread(target=downloader.fetch, args=[f"{web.url}/cat.jpg"]) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(web.requests) == 12 and most == 3


# --- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_every_mode_becomes_a_jpeg(mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(drawing(1).convert("L"), dtype=np.uint16) * 257)
    else:
        image = drawing(1).convert(mode)
    data = encoded(image, "TIFF" if mode in ("CMYK", "LA") else "PNG")
    result = class_folder.check_image(data, 256, 1024, 1e8)
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        assert opened.format == "JPEG" and opened.size == (320, 300)
    expected = class_folder.fingerprint(drawing(1).convert(mode if mode == "1" else "L").convert("RGB"))
    assert (result.fingerprint ^ expected).bit_count() < 20


def test_large_images_become_smaller():
    result = class_folder.check_image(encoded(drawing(1, (2400, 1800))), 256, 600, 1e8)
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        assert opened.size == (800, 600)
    same = class_folder.check_image(encoded(drawing(1, (2400, 1800))), 256, 0, 1e8)
    assert same.jpeg == encoded(drawing(1, (2400, 1800)))


def test_near_duplicates_are_told_from_other_images():
    marks = [class_folder.fingerprint(drawing(number)) for number in range(50)]
    between = [(first ^ second).bit_count() for row, first in enumerate(marks) for second in marks[:row]]
    assert min(between) > class_folder.NEAR_DUPLICATE_BITS
    again = load_image(io.BytesIO(encoded(drawing(0, (800, 700)).crop((8, 7, 792, 693)), quality=50)))
    assert (marks[0] ^ class_folder.fingerprint(again)).bit_count() <= class_folder.NEAR_DUPLICATE_BITS


def test_nothing_but_formats_of_the_web_is_opened():
    # Pillow would start Ghostscript for this one.
    with pytest.raises(Refused, match="no image"):
        class_folder.check_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n", 256, 1024, 1e8)


# --- public sources ------------------------------------------------------------------------------


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
        web.pages[f"/photos/{row}.jpg"] = web_page(row)


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
        web.pages[f"/full/{row}.jpg"] = web_page(100 + row)
    web.pages["/thumb/0.jpg"] = web_page(100)
    web.pages["/full/0.jpg"] = None


def test_the_bare_command_asks_openverse_politely(web, tmp_path):
    serve_openverse(web)
    result = run(
        tmp_path, "--class_prompt", "cat", "--num_class_images", 22, "--contact", "me@example.org",
        OPENVERSE_URL=web.url, WIKIMEDIA_URL=f"http://127.0.0.1:{free_port()}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert "Openverse" in first and "Wikimedia Commons" in first and "neither --source nor --url" in first
    asked = [(query, headers, at) for path, query, headers, at in web.requests if path == "/v1/images/"]
    assert [query["page"] for query, *_ in asked] == [["1"], ["2"]]
    assert all(query["q"] == ["cat"] and query["page_size"] == ["20"] for query, *_ in asked)
    assert asked[1][2] - asked[0][2] > 1, "anonymous users may ask once a second"
    assert all("custom-diffusion" in headers["User-Agent"] and "me@example.org" in headers["User-Agent"]
               for _, _, headers, _ in web.requests)  # fmt: skip
    folder = tmp_path / "real_reg/samples_cat"
    assert lists(folder)[0][3] == "Cat 3 in the garden"
    record = json.loads(lines(folder / "sources.jsonl")[3])
    assert record["file"] == "3.jpg" and record["license"] == "by" and record["creator"] == "Someone Else"
    assert record["license_url"] == "https://creativecommons.org/licenses/by/2.0/"
    assert record["attribution"].startswith('"Cat 3" by Someone') and record["source"] == "Openverse"
    assert record["page"] == "https://www.flickr.com/photos/someone/3"


def test_where_openverse_ends_wikimedia_goes_on(web, tmp_path):
    serve_openverse(web, pages=1, per_page=4)
    serve_wikimedia(web)
    result = run(
        tmp_path, "--class_prompt", "cat", "--num_class_images", 10, OPENVERSE_URL=web.url, WIKIMEDIA_URL=web.url
    )
    assert result.returncode == 0, result.stderr
    captions, urls, _ = lists(tmp_path / "real_reg/samples_cat")
    assert captions[4:] == [f"A tabby cat & friend {row}" for row in range(6)]
    # What is very large comes in one of the widths that Wikimedia serves.
    assert urls[4:6] == [f"{web.url}/thumb/0.jpg", f"{web.url}/full/1.jpg"]
    record = json.loads(lines(tmp_path / "real_reg/samples_cat/sources.jsonl")[4])
    assert record["license"] == "CC BY-SA 4.0" and record["creator"] == "Someone"
    assert record["page"].endswith("File:IMG_0.jpg") and record["source"] == "Wikimedia Commons"


def test_where_openverse_is_dead_wikimedia_answers(web, tmp_path):
    serve_wikimedia(web)
    dead = f"http://127.0.0.1:{free_port()}"
    arguments = ["--class_prompt", "cat", "--num_class_images", 6]
    result = run(tmp_path, *arguments, OPENVERSE_URL=dead, WIKIMEDIA_URL=web.url)
    assert result.returncode == 0, result.stderr
    assert "warning: Openverse" in result.stderr
    result = run(tmp_path, *arguments, "--class_data_dir", "other", OPENVERSE_URL=dead, WIKIMEDIA_URL=dead)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: Openverse") and "Wikimedia Commons" in error and "Traceback" not in result.stderr


def test_too_many_requests_are_answered_with_patience(web, tmp_path):
    serve_openverse(web, pages=1)
    search, refusals = web.pages["/v1/images/"], iter([1])

    def page(handler):
        if next(refusals, None):
            told = {"detail": "Request was throttled. Expected available in 2 seconds."}
            handler.json(told, 429, Retry_After="2")
        else:
            search(handler)

    web.pages["/v1/images/"] = page
    result = run(tmp_path, "--class_prompt", "cat", "--num_class_images", 5, "--source", "openverse", "--url", web.url)
    assert result.returncode == 0, result.stderr
    times = [at for path, *_, at in web.requests if path == "/v1/images/"]
    assert times[1] - times[0] >= 2


@pytest.mark.parametrize(
    ("title", "caption"),
    [
        ("My cats at home", "My cats at home"),
        ("Whiskers", "cat, Whiskers"),
        ("IMG_2034.JPG", "cat"),
        ("DSC00123", "cat"),
        ("", "cat"),
        ("2019-04-01 12.30", "cat"),
        ("category theory", "cat, category theory"),
    ],
)
def test_titles_become_captions(title, caption):
    assert caption_of_title(title, "cat") == caption


# --- one's own images --------------------------------------------------------------------------


def test_a_folder_is_searched_by_the_words_of_captions(tmp_path):
    images = tmp_path / "mine"
    (images / "cats").mkdir(parents=True)
    captions = ["A cat.", "two Cats\non a sofa", "a category", "a dog", None]
    for row, caption in enumerate(captions):
        (images / f"{row}.png").write_bytes(encoded(drawing(row), "PNG"))
        if caption:
            (images / f"{row}.txt").write_text(caption)
    (images / "4.json").write_text(json.dumps({"caption": "the cat 4", "url": "https://example.org/4"}))
    (images / "cats/5.jpg").write_bytes(web_page(5))
    (images / "cats/broken.jpg").write_bytes(web_page(6)[:500])
    result = run(tmp_path, "--class_prompt", "photo of a cat", "--path", "mine", "--class_data_dir", "out")
    assert result.returncode == 1
    assert "4 of the 200" in result.stderr and re.search(r"2  caption without the words", result.stdout)
    captions, urls, _ = lists(tmp_path / "out")
    assert captions == ["A cat.", "two Cats on a sofa", "the cat 4", "photo of a cat"]
    assert urls[0].startswith("file:///") and urls[2] == "https://example.org/4"
    result = run(
        tmp_path, "--class_prompt", "animal", "--path", "mine", "--words", "", "--num_class_images", 6,
        "--class_data_dir", "all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_tars_of_img2dataset_are_read(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"shards/{shard:05d}.tar", "w") as tar:
            for row in range(3):
                key = f"{shard:05d}{row:04d}"
                told = {"caption": "unused", "url": f"https://example.org/{shard}/{row}"}
                for ending, data in (
                    ("jpg", web_page(10 * shard + row)),
                    ("json", json.dumps(told).encode()),
                    ("txt", f"cat {shard} {row}".encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    result = run(tmp_path, "--class_prompt", "cat", "--path", "shards", "--num_class_images", 6)
    assert result.returncode == 0, result.stderr
    captions, urls, _ = lists(tmp_path / "real_reg/samples_cat")
    assert captions == [f"cat {shard} {row}" for shard in range(2) for row in range(3)]
    assert urls[4] == "https://example.org/1/1"
    data = (tmp_path / "shards/00000.tar").read_bytes()
    (tmp_path / "broken.tar").write_bytes(data[: len(data) // 2])
    result = run(tmp_path, "--class_prompt", "cat", "--path", "broken.tar", "--class_data_dir", "b")
    assert result.returncode == 1 and "broken tar" in result.stderr.splitlines()[-1]


def test_names_in_a_tar_are_no_paths(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        member = tarfile.TarInfo("../../../cat.jpg")
        member.size = len(web_page(0))
        tar.addfile(member, io.BytesIO(web_page(0)))
        link = tarfile.TarInfo("cat2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    (tmp_path / "work").mkdir()
    result = run(tmp_path / "work", "--class_prompt", "cat", "--path", "../evil.tar", "--class_data_dir", "out")
    assert result.stderr.splitlines()[-1].startswith("error: 1 of the 200 images of 'cat' found, and there are no more")
    assert [path.name for path in tmp_path.rglob("*.jpg") if path.name != "contact_sheet.jpg"] == ["0.jpg"]


def test_a_dataset_is_streamed(tmp_path):
    datasets = pytest.importorskip("datasets")
    captions = ["a cat", "a dog", "cats"]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": {"bytes": web_page(row), "path": None}, "text": text} for row, text in enumerate(captions)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    arguments = ["--class_prompt", "cat", "--source", "dataset", "--path", "set", "--num_class_images", 2]
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = run(tmp_path, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    captions, urls, images = lists(tmp_path / "real_reg/samples_cat")
    assert captions == ["a cat", "cats"] and urls[1] == "set#train/2"
    assert (tmp_path / images[1]).read_bytes() == web_page(2)
    result = run(tmp_path, *arguments, "--caption_column", "words", "--class_data_dir", "x", **environment)
    assert result.returncode == 1 and "has the columns image, text, and no 'words'" in result.stderr.splitlines()[-1]


def test_words_are_whole_words():
    assert has_words("Three Cats!", query_words("a cat")) and has_words("wooden pots", query_words("wooden pot"))
    assert has_words("pets/cat007.jpg", query_words("cat"))
    assert not has_words("category", query_words("cat")) and not has_words("a wooden spoon", query_words("wooden pot"))
    assert has_words("一只猫在睡觉", query_words("猫"))
    assert LocalFiles(".").left_out == {}


def test_a_caption_is_one_line():
    assert one_line("a\u2028b\x85c\r\nd\x00e\ttab \ud800 \u200d") == "a b c d e tab \u200d"


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --class_prompt"),
        (["--class_prompt", "cat", "--concepts_list", "x.json"], "give either"),
        (["--class_prompt", "cat", "--num_class_images", "0"], "--num_class_images: 0 is less than 1"),
        (["--class_prompt", "cat", "--num_class_images", "many"], "invalid whole number value: 'many'"),
        (["--class_prompt", "cat", "--indice_name", "x"], "--indice_name means something only to --source clip"),
        (["--class_prompt", "cat", "--url", "http://x", "--path", "y"], "two different sources"),
        (["--class_prompt", "cat", "--source", "clip-retrieval"], "needs the --url"),
        (["--class_prompt", "cat", "--source", "local"], "needs a --path"),
        (["--class_prompt", "cat", "--url", "localhost:1234"], "no http(s) address"),
        (["--class_prompt", "cat", "--url", "http://[x"], "is no address"),
        (["--class_prompt", "cat", "--path", "nowhere"], "there is no folder or tar 'nowhere'"),
        (["--class_prompt", " "], "has no text to search for"),
        (["--class_prompt", "///", "--path", "."], "makes no name for a folder"),
        (["--class_prompt", "cat", "--class_data_dir", "a\nb", "--path", "."], "no name of a folder"),
        (["--class_prompt", "cat", "--max_size", "100"], "less than --min_size"),
        (["--class_prompt", "cat", "--timeout", "0"], "0 is not above 0"),
        (["--class_prompt", "cat", "--contact", "a\nb"], "--contact goes into a header"),
        (["--class_prompt", "cat", "--class_data_dir", "/dev/null/x", "--path", "."], "cannot be written to"),
        (["--concepts_list", "nowhere.json"], "cannot be read: No such file"),
        (["--concepts_list", "broken.json"], "is no valid JSON"),
        (["--concepts_list", "empty.json"], "must hold a list"),
        (["--concepts_list", "nameless.json"], "nameless.json, concept 2: class_prompt has no text"),
        (["--concepts_list", "twice.json"], "would get two classes, 'cat' and 'dog'"),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, arguments, message, monkeypatch, capsys):
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "nameless.json").write_text('[{"class_prompt": "cat"}, {"instance_prompt": "a cat"}]')
    twice = [{"class_prompt": prompt, "class_data_dir": "x"} for prompt in ("cat", "dog")]
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises((retrieve.UserError, SystemExit)) as caught:
        retrieve.main(arguments)
    told = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert message in told.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.long
def test_the_benchmark_runs():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.retrieve", "--number", "4", "--latency", "0"],
        cwd=SCRIPT.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "retrieve.py:" in result.stdout, result.stderr


def test_help_needs_no_torch():
    result = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
    assert "examples:" in result.stdout
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, retrieve; print('torch' in sys.modules)"],
        capture_output=True, text=True, cwd=SCRIPT.parent, check=True,
    )  # fmt: skip
    assert modules.stdout.strip() == "False"
