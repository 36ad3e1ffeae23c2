"""What messages of retrieve.py say to do: every suggestion is done as it stands there, and has to help."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.images import find_class_images
from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.services import base_address
from tests.retrieval_images import drawing, encoded, jpeg
from tests.retrieval_web import (
    Web,
    free_port,
    lists,
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


@pytest.fixture
def old():
    """Where a service was before it moved."""
    yield from serving()


def last_line(result):
    assert result.returncode == 1 and "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def suggested(message, pattern):
    """The flags that a message suggests, as a shell would take them."""
    return shlex.split(re.search(pattern, message)[1])


def below(web, prefix):
    """The same service, but below a path of its address."""
    for path in [path for path in web.pages if "/good/" not in path]:
        web.pages[prefix + path] = web.pages[path]


# --- services that have moved ----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/api/v2", "/straße"])
@pytest.mark.parametrize(
    "rest", ["?from=old", *(pytest.param(rest, marks=pytest.mark.long) for rest in ("", "/", "#top"))]
)
def test_the_new_address_of_a_clip_retrieval_service_works(web, old, tmp_path, prefix, rest):
    serve_good(web, 3)
    below(web, prefix)
    target = web.url + prefix + "/knn-service" + rest
    old.pages["/knn-service"] = lambda handler: answer_raw(handler, target)
    arguments = ["--class_prompt", "cat", "--num_class_images", 3]
    web.pages |= {path.replace("ß", "%C3%9F"): page for path, page in list(web.pages.items())}
    message = last_line(run(tmp_path, *arguments, "--url", old.url))
    assert run(tmp_path, *arguments, *suggested(message, r"give (--url \S+) instead")).returncode == 0


def answer_raw(handler, target):
    """A redirect whose Location is in raw UTF-8, as many servers send it."""
    handler.wfile.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + target.encode() + b"\r\n\r\n")


def test_the_new_address_also_follows_from_the_list_of_indices(web, old, tmp_path):
    serve_mixture(web)
    for path in ("/knn-service", "/indices-list"):
        old.pages[path] = lambda handler, path=path: handler.answer(b"", status=301, Location=web.url + path)
    arguments = ["--class_prompt", "cat", "--num_class_images", 3, "--timeout", 2, "--indice_name", "mine"]
    message = last_line(run(tmp_path, *arguments, "--url", old.url))
    assert run(tmp_path, *arguments, *suggested(message, r"give (--url \S+) instead")).returncode == 0


@pytest.mark.parametrize("given", [[], ["--source", "openverse"], ["--source", "openverse", "--url"]])
@pytest.mark.parametrize("path", ["/v1/images/", "/api/v1/images/?q=cat&page=1"])
def test_the_new_address_of_openverse_works(web, old, tmp_path, given, path):
    serve_openverse(web, pages=1)
    below(web, "/api")
    old.pages["/v1/images/"] = lambda handler: handler.answer(b"", status=308, Location=web.url + path)
    given = [*given, old.url] if given[-1:] == ["--url"] else given
    arguments = ["--class_prompt", "cat", "--num_class_images", 3, *given]
    addresses = {"OPENVERSE_URL": old.url, "WIKIMEDIA_URL": f"http://127.0.0.1:{free_port()}"}
    message = last_line(run(tmp_path, *arguments, **addresses))
    flags = suggested(message, r"give (--source openverse --url \S+) instead")
    assert run(tmp_path, *arguments, *flags, **addresses).returncode == 0


def test_the_new_address_of_wikimedia_works(web, old, tmp_path):
    serve_wikimedia(web)
    old.pages["/w/api.php"] = lambda handler: handler.answer(b"", status=301, Location=f"{web.url}{handler.path}")
    arguments = ["--class_prompt", "cat", "--num_class_images", 3]
    addresses = {"WIKIMEDIA_URL": old.url, "OPENVERSE_URL": f"http://127.0.0.1:{free_port()}"}
    message = last_line(run(tmp_path, *arguments, **addresses))
    flags = suggested(message, r"give (--source wikimedia --url \S+) instead")
    assert run(tmp_path, *arguments, *flags, **addresses).returncode == 0


@pytest.mark.parametrize(
    "target", ["/login?next=/knn-service", "https://elsewhere.example/", "ftp://elsewhere.example/knn-service",
               "http://[bad/knn-service", "/knn-service", "/knn-service/"],
)  # fmt: skip
def test_nothing_is_suggested_where_no_address_follows(web, tmp_path, target):
    web.pages["/knn-service"] = lambda handler: handler.answer(b"", status=302, Location=target)
    message = last_line(run(tmp_path, "--class_prompt", "cat", "--url", web.url))
    assert "redirects /knn-service to" in message and "--url" not in message


def test_a_password_is_not_repeated_in_the_new_address(web, tmp_path):
    web.pages["/knn-service"] = lambda handler: handler.answer(
        b"", status=302, Location="https://me:secret@elsewhere.example/knn-service"
    )
    url = web.url.replace("//", "//me:secret@")
    message = last_line(run(tmp_path, "--class_prompt", "cat", "--url", url))
    assert "secret" not in message
    assert "give --url https://elsewhere.example instead (with your user name and password in it)" in message


def test_base_addresses():
    assert base_address("https://x.example/knn-service", "/knn-service") == "https://x.example"
    assert base_address("http://[::1]:1234/a/knn-service/?b", "/knn-service") == "http://[::1]:1234/a"
    assert base_address("https://x.example/other", "/knn-service") is None
    assert base_address("https://x.example:many/knn-service", "/knn-service") is None


# --- who asks --------------------------------------------------------------------------------------


def wants_contact(page):
    """A page for those only who say whom to write to."""
    return lambda handler: page(handler) if "@" in handler.headers["User-Agent"] else handler.answer(b"", status=403)


def test_where_wikimedia_forbids_a_contact_helps(web, tmp_path):
    serve_wikimedia(web)
    web.pages["/w/api.php"] = wants_contact(web.pages["/w/api.php"])
    arguments = ["--class_prompt", "cat", "--num_class_images", 3, "--source", "wikimedia", "--url", web.url]
    message = last_line(run(tmp_path, *arguments))
    assert "HTTP status 403" in message
    assert run(tmp_path, *arguments, *suggested(message, r"(--contact \S+)")).returncode == 0


def test_where_the_images_of_wikimedia_are_forbidden_a_contact_helps(web, tmp_path):
    serve_wikimedia(web)
    for row in range(6):
        for path in (f"/full/{row}.jpg", f"/thumb/{row}.jpg"):
            body = web.pages.get(path)
            if body:
                web.pages[path] = wants_contact(lambda handler, body=body: handler.answer(body))
    arguments = ["--class_prompt", "cat", "--num_class_images", 3, "--source", "wikimedia", "--url", web.url]
    result = run(tmp_path, *arguments)
    assert result.returncode == 1
    assert run(tmp_path, *arguments, *suggested(result.stdout, r"(--contact \S+)")).returncode == 0


def test_who_has_given_a_contact_is_not_asked_for_one(web, tmp_path):
    web.pages["/w/api.php"] = lambda handler: handler.answer(b"", status=403)
    arguments = ["--class_prompt", "cat", "--source", "wikimedia", "--url", web.url, "--contact", "me@example.org"]
    assert "--contact" not in last_line(run(tmp_path, *arguments))


# --- too few images --------------------------------------------------------------------------------


def test_where_there_are_no_more_every_suggestion_helps(web, tmp_path):
    """Fewer images, smaller ones, or any caption."""
    (tmp_path / "mine").mkdir()
    sizes = {"cat0": 300, "cat1": 140, "dog2": 300}
    for number, (name, size) in enumerate(sizes.items()):
        (tmp_path / f"mine/{name}.jpg").write_bytes(encoded(drawing(number, (size, size))))
    for flags, more in (("--num_class_images", 0), ("--min_size", 1), ("--words", 1)):
        arguments = ["--class_prompt", "cat", "--path", "mine", "--num_class_images", 2, "--class_data_dir", flags[2:]]
        message = last_line(run(tmp_path, *arguments))
        assert "1 of the 2 images of 'cat' found, and there are no more: give " in message
        result = run(tmp_path, *arguments, *suggested(message, rf"({flags} [^ ,]+)"))
        assert result.returncode == 0 and len(lists(tmp_path / flags[2:])[0]) == 1 + more


def test_a_host_inside_the_network_can_be_allowed(web, tmp_path):
    try:
        inner = Web("127.0.0.2")  # another address of this machine than the one that is given
    except OSError:
        pytest.skip("127.0.0.2 is no address of this system")
    inner.pages["/cat.jpg"] = jpeg(0)
    web.pages["/knn-service"] = lambda handler: handler.json([{"id": 1, "url": f"{inner.url}/cat.jpg"}])
    arguments = ["--class_prompt", "cat", "--num_class_images", 1, "--url", web.url]
    result = run(tmp_path, *arguments)
    assert result.returncode == 1 and "--private_host" in last_line(result)
    assert run(tmp_path, *arguments, "--private_host", "127.0.0.2").returncode == 0
    web.pages["/knn-service"] = lambda handler: handler.json([{"id": 1, "url": "http://10.0.0.1/cat.jpg"}])
    message = last_line(run(tmp_path, *arguments, "--class_data_dir", "other"))
    assert "--private_host and the host, if you trust it" in message
    inner.server.shutdown()


def test_an_index_of_the_list_works(web, tmp_path):
    serve_mixture(web)
    arguments = ["--class_prompt", "cat", "--num_class_images", 3, "--timeout", 2, "--url", web.url]
    message = last_line(run(tmp_path, *arguments, "--indice_name", "laion_400m"))
    for name in re.search(r"but: (.+)", message)[1].split(", "):
        assert run(tmp_path, *arguments, "--indice_name", name, "--class_data_dir", name).returncode == 0
    web.pages["/indices-list"] = lambda handler: handler.json([])
    assert last_line(run(tmp_path, *arguments, "--indice_name", "x")).endswith("has no index 'x'")


# --- folders and arguments -------------------------------------------------------------------------


def test_the_way_out_of_a_folder_that_cannot_be_used(web, tmp_path):
    serve_good(web, 3)
    arguments = ["--class_prompt", "cat", "--url", web.url, "--num_class_images", 3, "--class_data_dir", "cats"]
    (tmp_path / "cats").mkdir()
    line = {"file": "0.jpg", "caption": "", "url": "", "class_prompt": "cat", "fingerprint": "0"}
    (tmp_path / "cats/sources.jsonl").write_text(json.dumps(line) + "\nbroken\n")
    message = last_line(run(tmp_path, *arguments))
    assert "line 2 is broken: remove that line" in message
    (tmp_path / "cats/sources.jsonl").write_text(json.dumps(line) + "\n")
    assert run(tmp_path, *arguments).returncode == 0
    message = last_line(run(tmp_path, *arguments, "--class_prompt", "dog"))
    assert "give another --class_data_dir for 'dog'" in message
    assert run(tmp_path, *arguments, "--class_prompt", "dog", "--class_data_dir", "dogs").returncode == 0


@pytest.mark.parametrize("is_there", [False, True])
def test_the_command_that_training_names_gets_the_images(tmp_path, is_there):
    (tmp_path / "mine").mkdir()
    for number in range(3):
        (tmp_path / f"mine/a black cat {number}.jpg").write_bytes(jpeg(number))
    folder = tmp_path / "class images"
    if is_there:
        run(
            tmp_path,
            "--class_prompt",
            "a black cat",
            "--path",
            "mine",
            "--class_data_dir",
            folder,
            "--num_class_images",
            1,
        )
    concept = ConceptEntry(class_prompt="a black cat", class_data_dir=str(folder))
    with pytest.raises(UserError) as caught:
        find_class_images([concept], 3, real_prior=True)
    command = shlex.split(re.search(r"with: (python retrieve\.py .+)", str(caught.value))[1])
    assert run(tmp_path, *command[2:], "--path", "mine").returncode == 0
    assert len(find_class_images([concept], 3, real_prior=True)) == 3


def test_the_examples_in_messages_about_arguments_are_right(web, tmp_path):
    serve_good(web, 2)
    message = last_line(run(tmp_path, "--class_prompt", "cat", "--url", web.url.removeprefix("http://")))
    assert "is no http(s) address, such as http://localhost:1234" in message
    message = last_line(run(tmp_path, "--class_prompt", "cat", "--url", "http://127.0.0.1:many"))
    assert "is no address" in message
    (tmp_path / "images.zip").write_bytes(b"PK")
    assert "unpack it" in last_line(run(tmp_path, "--class_prompt", "cat", "--path", "images.zip"))
