"""Requests per host: pauses that a host asks for, and connections at a time."""

from __future__ import annotations

import email.utils
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from custom_diffusion.retrieval import host_limits
from custom_diffusion.retrieval.download import Downloader
from custom_diffusion.retrieval.host_limits import retry_after
from custom_diffusion.retrieval.sources import Postponed, Refused
from tests.retrieval_images import jpeg
from tests.retrieval_web import (
    Web,
    left_out,
    lists,
    redirect,
    run,
    serve_good,
    serve_openverse,
    serve_wikimedia,
    serving,
)


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


def refusing(status=429, after=None, refusals=10**9):
    """A page that refuses so many times, and then is an image."""
    left = iter(range(refusals))

    def page(handler):
        if next(left, None) is None:
            handler.answer(jpeg(0))
        else:
            headers = {"Retry_After": after() if callable(after) else after} if after is not None else {}
            handler.answer(b"", status=status, **headers)

    return page


def times(web, path):
    return [at for one, *_, at in web.requests if one == path]


def in_seconds(seconds):
    return lambda: email.utils.formatdate(time.time() + seconds, usegmt=True)


def fetch_all(downloader, addresses):
    """What becomes of many downloads side by side."""

    def fetch(address):
        try:
            return downloader.fetch(address)
        except Refused as refusal:
            return refusal

    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(fetch, addresses))


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("after", ["120", in_seconds(120), "Fri, 31 Dec 2999 23:59:59 GMT", "99999999999999999999999"])
def test_no_request_before_its_time_from_any_thread(web, status, after):
    web.pages["/first.jpg"] = refusing(status, after)
    for row in range(30):
        web.pages[f"/{row}.jpg"] = jpeg(row)
    downloader = Downloader("test", private_hosts=["127.0.0.1"])
    with pytest.raises(Postponed):
        downloader.fetch(f"{web.url}/first.jpg")
    results = fetch_all(downloader, [f"{web.url}/{row}.jpg" for row in range(30)])
    assert all(isinstance(result, Postponed) and result.seconds > 100 for result in results)
    assert web.paths() == ["/first.jpg"]


@pytest.mark.parametrize("after", ["1", pytest.param(in_seconds(2), marks=pytest.mark.long)])
def test_a_short_pause_is_kept_by_all_threads_and_then_all_are_served(web, after):
    web.pages["/first.jpg"] = refusing(429, after, 1)
    for row in range(12):
        web.pages[f"/{row}.jpg"] = jpeg(row)
    downloader = Downloader("test", private_hosts=["127.0.0.1"])
    first = threading.Thread(target=downloader.fetch, args=[f"{web.url}/first.jpg"])
    first.start()
    while not web.requests:
        assert first.is_alive(), "it ended by itself"
        time.sleep(0.01)
    time.sleep(0.1)
    results = fetch_all(downloader, [f"{web.url}/{row}.jpg" for row in range(12)])
    first.join()
    assert results == [jpeg(row) for row in range(12)]
    begun = sorted(at for *_, at in web.requests)
    assert len(begun) == 14 and begun[1] - begun[0] >= 0.95


@pytest.mark.parametrize(
    "after",
    [
        None,
        in_seconds(-100),
        *(pytest.param(text, marks=pytest.mark.long) for text in ("0", "soon", "-5", "", "Fri, 99")),
    ],
)
def test_without_a_time_the_pauses_grow(web, after, monkeypatch):
    monkeypatch.setattr(host_limits, "FIRST_PAUSE", 0.2)
    web.pages["/cat.jpg"] = refusing(503, after)
    downloader = Downloader("test", private_hosts=["127.0.0.1"], seconds=10)
    with pytest.raises(Postponed):
        downloader.fetch(f"{web.url}/cat.jpg")
    one, two, three = times(web, "/cat.jpg")
    assert two - one >= 0.2 and three - two >= 0.4
    # The host is to be left alone for twice as long again now, whoever asks.
    with pytest.raises(Postponed):
        Downloader("other", private_hosts=["127.0.0.1"], seconds=0.3, limits=downloader.limits).fetch(f"{web.url}/x")
    assert len(web.requests) == 3


def test_refusals_that_were_on_their_way_together_count_once(web):
    together = threading.Barrier(8)

    def page(handler):
        together.wait(5)
        handler.answer(b"", status=429)

    web.pages["/cat.jpg"] = page
    downloader = Downloader("test", private_hosts=["127.0.0.1"], seconds=0.9)
    results = fetch_all(downloader, [f"{web.url}/cat.jpg"] * 8)
    assert all(isinstance(result, Postponed) and result.seconds <= 1 for result in results)


def test_after_a_pause_one_request_goes_ahead(web):
    at_once, lock, seen = 0, threading.Lock(), []
    first = iter([1])

    def page(handler):
        nonlocal at_once
        if next(first, None):
            handler.answer(b"", status=429, Retry_After="1")
            return
        with lock:
            at_once += 1
            seen.append(at_once)
        time.sleep(0.2)
        with lock:
            at_once -= 1
        handler.answer(b"x")

    web.pages["/cat.jpg"] = page
    downloader = Downloader("test", private_hosts=["127.0.0.1"])
    starter = threading.Thread(target=downloader.fetch, args=[f"{web.url}/cat.jpg"])
    starter.start()
    while not web.requests:
        assert starter.is_alive(), "it ended by itself"
        time.sleep(0.01)
    time.sleep(0.1)
    fetch_all(downloader, [f"{web.url}/cat.jpg"] * 6)
    starter.join()
    assert seen[0] == 1 and max(seen) > 1
    begun = sorted(at for *_, at in web.requests)
    assert begun[2] - begun[1] >= 0.2


def test_other_hosts_are_asked_meanwhile(web):
    other = Web()
    web.pages["/cat.jpg"], other.pages["/cat.jpg"] = refusing(429, "120"), jpeg(0)
    downloader = Downloader("test", private_hosts=["127.0.0.1"])
    with pytest.raises(Postponed):
        downloader.fetch(f"{web.url}/cat.jpg")
    assert downloader.fetch(f"{other.url}/cat.jpg") == jpeg(0)
    other.server.shutdown()


def test_a_redirect_leads_around_no_pause_and_no_limit(web):
    other, at_once, most, lock = Web(), 0, 0, threading.Lock()

    def page(handler):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.1)
        with lock:
            at_once -= 1
        handler.answer(b"x")

    other.pages |= {"/cat.jpg": page, "/busy.jpg": refusing(429, "120")}
    for row in range(8):
        web.pages[f"/{row}.jpg"] = redirect(f"{other.url}/cat.jpg")
    web.pages["/busy.jpg"] = redirect(f"{other.url}/busy.jpg")
    downloader = Downloader("test", private_hosts=["127.0.0.1"], per_host=2)
    assert fetch_all(downloader, [f"{web.url}/{row}.jpg" for row in range(8)]) == [b"x"] * 8
    assert most == 2
    with pytest.raises(Postponed):
        downloader.fetch(f"{web.url}/busy.jpg")
    before = len(other.requests)
    assert isinstance(fetch_all(downloader, [f"{web.url}/0.jpg"])[0], Postponed)
    assert len(other.requests) == before
    other.server.shutdown()


@pytest.mark.long
def test_waiting_for_a_connection_takes_no_time_from_an_image(web):
    web.pages["/cat.jpg"] = lambda handler: (time.sleep(0.4), handler.answer(b"x"))
    downloader = Downloader("test", private_hosts=["127.0.0.1"], per_host=1, seconds=1)
    assert fetch_all(downloader, [f"{web.url}/cat.jpg"] * 5) == [b"x"] * 5


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "²"}, 0),
        ({"Retry-After": "nan"}, 0),
        ({}, 0),
        # The clock of the server, whatever the clock here says; in all forms that dates have had.
        ({"Retry-After": "Sun, 06 Nov 1994 08:50:37 GMT", "Date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 60),
        ({"Retry-After": "Sunday, 06-Nov-94 08:50:37 GMT", "Date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 60),
        ({"Retry-After": "Sun Nov  6 08:50:37 1994", "Date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 60),
        ({"Retry-After": "Sun, 06 Nov 1994 08:48:37 GMT", "Date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),
    ],
)
def test_what_retry_after_says(headers, seconds):
    assert retry_after(headers) == seconds


def test_candidates_of_a_host_that_wants_a_pause_are_left_for_later(web, tmp_path):
    """And taken by the same command after that."""
    serve_good(web, 40)
    images = {path: page for path, page in web.pages.items() if path.startswith("/good")}
    for path in images:
        web.pages[path] = refusing(429, "120")
    web.pages["/good/0.jpg"] = images["/good/0.jpg"]
    arguments = ["--class_prompt", "cat", "--url", web.url, "--num_class_images", 30, "--connections", 1]
    result = run(tmp_path, *arguments)
    assert result.returncode == 1
    # The service is on the same host, and is not asked any more either.
    assert web.paths() == ["/knn-service", "/good/0.jpg", "/good/1.jpg"]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: 1 of the 30 images of 'cat' found; ") and "left for later" in last
    assert "asks for a pause of 2 minutes" in last and last.endswith("run the same command again after that")
    assert left_out(result)["left for later"] >= 20
    web.pages |= images
    assert run(tmp_path, *arguments).returncode == 0
    assert lists(tmp_path / "real_reg/samples_cat")[0] == [f"cat number {row}" for row in range(30)]


def test_a_wait_of_some_seconds_is_announced_once(web, tmp_path, monkeypatch):
    monkeypatch.setattr(host_limits, "UNANNOUNCED", 0.5)
    serve_good(web, 6)
    first, left = web.pages["/good/2.jpg"], iter([1])
    web.pages["/good/2.jpg"] = lambda handler: (
        handler.answer(b"", status=503, Retry_After="2") if next(left, None) else first(handler)
    )
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--num_class_images", 6)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"waiting \d seconds, as \S+ asks \(HTTP status 503\)", result.stderr)) == 1


@pytest.mark.long
def test_a_long_pause_of_a_search_service_asks_the_next_source_at_once(web, tmp_path):
    wikimedia = Web()
    serve_openverse(web)
    serve_wikimedia(wikimedia)
    web.pages["/v1/images/"] = refusing(429, "300")
    (tmp_path / "list.json").write_text(json.dumps([{"class_prompt": "cat"}, {"class_prompt": "tabby"}]))
    started = time.monotonic()
    result = run(
        tmp_path, "--concepts_list", "list.json", "--num_class_images", 3,
        OPENVERSE_URL=web.url, WIKIMEDIA_URL=wikimedia.url,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 30
    # Nor is it asked again for the next class.
    assert web.paths() == ["/v1/images/"]
    assert "warning: Openverse" in result.stderr and "asks for a pause of 5 minutes" in result.stderr
    result = run(tmp_path, "--class_prompt", "cat", "--source", "openverse", "--url", web.url, "--class_data_dir", "x")
    assert result.returncode == 1 and "run the same command again after that" in result.stderr.splitlines()[-1]
    wikimedia.server.shutdown()


@pytest.mark.long
def test_a_long_pause_of_the_images_asks_the_next_source_at_once(web, tmp_path):
    images, wikimedia = Web(), Web()
    serve_openverse(web, pages=9)
    serve_wikimedia(wikimedia)
    for path in [path for path in web.pages if path.startswith("/photos")]:
        web.pages[path] = redirect(f"{images.url}{path}")
        images.pages[path] = refusing(429, "300")
    search = web.pages["/v1/images/"]

    class Moved:
        """The search, whose images are on another host."""

        def __init__(self, handler):
            self.handler, self.path = handler, handler.path

        def json(self, content):
            for entry in content["results"]:
                entry["url"] = entry["url"].replace(web.url, images.url)
            self.handler.json(content)

    web.pages["/v1/images/"] = lambda handler: search(Moved(handler))
    result = run(
        tmp_path, "--class_prompt", "cat", "--num_class_images", 4, "--connections", 2,
        OPENVERSE_URL=web.url, WIKIMEDIA_URL=wikimedia.url,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(images.requests) <= 2 and len(web.paths()) <= 3
    assert all(url.startswith(wikimedia.url) for url in lists(tmp_path / "real_reg/samples_cat")[1])
    for server in (images, wikimedia):
        server.server.shutdown()


def test_a_service_that_wants_a_long_pause_is_left_for_the_next_source(web, tmp_path):
    wikimedia = Web()
    serve_wikimedia(wikimedia)
    web.pages["/v1/images/"] = refusing(503, "300")
    arguments = ["--class_prompt", "cat", "--num_class_images", 3]
    result = run(tmp_path, *arguments, OPENVERSE_URL=web.url, WIKIMEDIA_URL=wikimedia.url)
    assert result.returncode == 0 and web.paths() == ["/v1/images/"], result.stderr
    assert "asks for a pause of 5 minutes" in result.stderr
    wikimedia.server.shutdown()
