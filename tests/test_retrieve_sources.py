"""Search services: clip-retrieval, Openverse and Wikimedia Commons."""

from __future__ import annotations

import base64
import json

import pytest

from custom_diffusion.retrieval.public import Openverse
from tests.retrieval_images import drawing, encoded
from tests.retrieval_web import (
    free_port,
    left_out,
    lines,
    lists,
    redirect,
    run,
    serve_good,
    serve_mixture,
    serve_openverse,
    serve_wikimedia,
    serving,
)


@pytest.fixture
def web():
    yield from serving()


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


def test_images_inside_a_reply_need_no_number_to_be_told_apart(web, tmp_path):
    entries = [{"image": base64.b64encode(encoded(drawing(row))).decode()} for row in range(40)]
    entries[1] = entries[0]
    web.pages["/knn-service"] = lambda handler: handler.json(entries[: json.loads(handler.body)["num_images"]])
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--num_class_images", 50)
    assert "39 of the 50 images" in result.stderr and left_out(result) == {"the same address again": 1}


@pytest.mark.parametrize(
    "page",
    [None, 7, "text", [], {}, {"imageinfo": None}, {"imageinfo": []}, {"imageinfo": {"url": "x"}},
     {"imageinfo": ["x"]}, {"imageinfo": [{"url": None}]}, {"imageinfo": [{"url": "  "}]}],
)  # fmt: skip
def test_entries_of_any_form_are_counted(web, tmp_path, page):
    for pages in ([page], {"1": page}):
        web.pages["/w/api.php"] = lambda handler, pages=pages: handler.json({"query": {"pages": pages}})
        web.pages["/v1/images/"] = lambda handler: handler.json({"page_count": 1, "results": [page]})
        for source in ("wikimedia", "openverse"):
            result = run(tmp_path, "--class_prompt", "cat", "--source", source, "--url", web.url)
            assert result.returncode == 1 and left_out(result) == {"neither address nor image": 1}


@pytest.mark.parametrize("reply", [{"query": []}, {"query": {"pages": None}}, {"query": {"pages": "x"}}, {}])
def test_a_reply_without_pages_is_the_end(web, tmp_path, reply):
    web.pages["/w/api.php"] = lambda handler: handler.json(reply)
    result = run(tmp_path, "--class_prompt", "cat", "--source", "wikimedia", "--url", web.url)
    assert result.stderr.splitlines()[-1].startswith("error: 0 of the 200 images of 'cat' found, and there are no more")


@pytest.mark.parametrize("told", [None, [], ["x"], {"Artist": None}, {"Artist": {"value": 7}}])
def test_what_wikimedia_tells_of_an_image_may_have_any_form(web, tmp_path, told):
    web.pages["/cat.jpg"] = encoded(drawing(0))
    page = {"title": "File:A cat.jpg", "imageinfo": [{"url": f" {web.url}/cat.jpg ", "extmetadata": told}]}
    web.pages["/w/api.php"] = lambda handler: handler.json({"query": {"pages": [page]}})
    arguments = ["--class_prompt", "cat", "--source", "wikimedia", "--url", web.url, "--num_class_images", 1]
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    captions, urls, _ = lists(tmp_path / "real_reg/samples_cat")
    assert captions == ["A cat"] and urls == [f"{web.url}/cat.jpg"]


def test_openverse_is_asked_for_photographs_and_no_more_than_it_gives_to_anyone(web):
    serve_openverse(web, pages=14, per_page=1)
    source = Openverse("test", web.url)
    source.service.interval = 0
    assert len(list(source.candidates("cat", 300))) == 12
    asked = [query for path, query, *_ in web.requests if path == "/v1/images/"]
    assert [query["page"] for query in asked] == [[str(page)] for page in range(1, 13)]
    assert all(query["category"] == ["photograph"] for query in asked)
