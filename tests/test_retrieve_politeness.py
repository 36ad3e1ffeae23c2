"""Requests per host: pauses that a host asks for, and connections at a time."""

from __future__ import annotations

import threading
import time

import pytest

from custom_diffusion.retrieval.download import Downloader
from tests.retrieval_images import jpeg
from tests.retrieval_web import run, serve_openverse, serving


@pytest.fixture
def web():
    yield from serving()


def test_passing_failures_are_tried_again(web):
    replies = iter([503, 429])

    def page(handler):
        status = next(replies, None)
        if status:
            handler.answer(b"", status=status, Retry_After="1")
        else:
            handler.answer(jpeg(0))

    web.pages["/cat.jpg"] = page
    downloader = Downloader("test", private_hosts=["127.0.0.1"])
    assert downloader.fetch(f"{web.url}/cat.jpg") == jpeg(0)
    times = [at for *_, at in web.requests]
    assert len(times) == 3 and times[1] - times[0] >= 1


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
