"""Images per second of retrieve.py, beside a loop that fetches one image after the other, as diffusers' example does.

A local server stands for the web: every image takes 100 ms, as one from another continent does.

    python -m benchmarks.retrieve --number 600

Starting Python and making the contact sheet take retrieve.py about half a second, whatever the number.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import requests
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "retrieve.py"


def photograph(number: int, side: int) -> bytes:
    """A JPEG of about the size that a photograph of ``side`` pixels has, different for every number."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = random.integers(-12, 13, pixels.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def serve(number: int, side: int, latency: float, ready: Connection) -> None:
    """A clip-retrieval service and its images, until the process is ended."""
    images = [photograph(row, side) for row in range(number)]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["num_images"]
            base = f"http://{self.headers['Host']}"
            rows = range(min(asked, number))
            self.answer(json.dumps([{"id": row, "url": f"{base}/{row}", "caption": f"cat {row}"} for row in rows]))

        def do_GET(self) -> None:
            time.sleep(latency)
            self.answer(images[int(self.path[1:])])

        def answer(self, body: bytes | str) -> None:
            body = body.encode() if isinstance(body, str) else body
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    ready.send((server.server_port, sum(map(len, images)) / len(images)))
    server.serve_forever()


def one_at_a_time(url: str, number: int, folder: Path) -> float:
    """Seconds for fetching one image after the other: a connection each, not decoded, as in the example."""
    started = time.perf_counter()
    for row in range(number):
        content = requests.get(f"{url}/{row}", timeout=30).content
        Image.open(io.BytesIO(content))
        (folder / f"{row}.jpg").write_bytes(content)
    return time.perf_counter() - started


def side_by_side(url: str, number: int, folder: Path) -> float:
    """Seconds for retrieve.py as a command: start-up, decoding, lists and contact sheet included."""
    arguments = ["--class_prompt", "cat", "--class_data_dir", str(folder), "--num_class_images", str(number)]
    started = time.perf_counter()
    subprocess.run([sys.executable, SCRIPT, *arguments, "--url", url], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure both, and print a table."""
    parser = argparse.ArgumentParser(description="Measure how many images per second retrieve.py collects.")
    parser.add_argument("--number", type=int, default=600, help="Images to retrieve.")
    parser.add_argument("--side", type=int, default=512, help="Side of the images in pixels.")
    parser.add_argument("--latency", type=float, default=0.1, help="Seconds that the server takes for each.")
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(args.number, args.side, args.latency, there), daemon=True)
    server.start()
    port, size = here.recv()
    print(f"{args.number} images of {args.side} x {args.side} pixels, {size / 1024:.0f} KiB, {args.latency} s each")
    with tempfile.TemporaryDirectory() as folder:
        times = {}
        for name, measure in (("one at a time", one_at_a_time), ("retrieve.py", side_by_side)):
            path = Path(folder, name)
            path.mkdir()
            times[name] = measure(f"http://127.0.0.1:{port}", args.number, path)
    server.terminate()
    for name, seconds in times.items():
        rate, gain = args.number / seconds, times["one at a time"] / seconds
        print(f"{name:>15}: {seconds:6.2f} s, {rate:6.1f} images/s, {gain:5.1f} x")


if __name__ == "__main__":
    main()
