"""Downloads: only from public addresses, never too much, never for ever."""

from __future__ import annotations

import shutil
import subprocess
import time
from urllib.parse import urlsplit

import pytest

from custom_diffusion.retrieval.download import Downloader
from custom_diffusion.retrieval.guarded_session import is_public
from custom_diffusion.retrieval.sources import Refused
from tests.retrieval_images import jpeg
from tests.retrieval_web import Web, redirect, serving, slow_body, slow_headers


@pytest.fixture
def web():
    yield from serving()


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
    web.pages["/cat.jpg"] = jpeg(0)
    port = urlsplit(web.url).port
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test").fetch(f"http://{host}:{port}/cat.jpg")
    assert not web.requests
    assert Downloader("test", private_hosts=["127.0.0.1"]).fetch(f"{web.url}/cat.jpg") == jpeg(0)


def test_no_redirect_leads_to_another_private_address(web):
    try:
        inner = Web("127.0.0.2")
    except OSError:
        pytest.skip("127.0.0.2 is no address of this system")
    inner.pages["/secret"] = jpeg(0)
    web.pages["/cat.jpg"] = redirect(f"{inner.url}/secret")
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test", private_hosts=["127.0.0.1"]).fetch(f"{web.url}/cat.jpg")
    assert not inner.requests
    assert Downloader("test", private_hosts=["127.0.0.1", "127.0.0.2"]).fetch(f"{web.url}/cat.jpg") == jpeg(0)
    inner.server.shutdown()


def test_behind_a_proxy_private_addresses_are_refused_too(web, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test").fetch("http://10.0.0.1/cat.jpg")
    assert not web.requests


def test_owners_who_opt_out_are_heeded(web):
    web.pages["/cat.jpg"] = lambda handler: handler.answer(jpeg(0), X_Robots_Tag="noai, noimageai")
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
    web.pages |= {"/cat.jpg": jpeg(0), "/slow.jpg": slow_body, "/headers.jpg": slow_headers}
    downloader = Downloader("test", seconds=1, private_hosts=["127.0.0.1"])
    with pytest.raises(Refused, match="no answer"):  # an unknown certificate
        downloader.fetch(f"{web.url}/cat.jpg")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "public"))
    assert downloader.fetch(f"{web.url}/cat.jpg") == jpeg(0)
    assert downloader.fetch(f"{web.url.replace('127.0.0.1', 'localhost')}/cat.jpg") == jpeg(0)
    for page in ("slow", "headers"):
        start = time.monotonic()
        with pytest.raises(Refused, match="too slow"):
            downloader.fetch(f"{web.url}/{page}.jpg")
        assert time.monotonic() - start < 3
    with pytest.raises(Refused, match="inside a private network"):
        Downloader("test").fetch(f"{web.url}/cat.jpg")
    web.server.shutdown()


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ("/straße/ü b.jpg".encode(), "/stra%C3%9Fe/%C3%BC%20b.jpg"),
        ("/猫.jpg?x=é".encode(), "/%E7%8C%AB.jpg"),
        ("/café.jpg".encode("latin-1"), "/caf%E9.jpg"),
        (b"/caf%C3%A9.jpg", "/caf%C3%A9.jpg"),
        (b"  /cat.jpg  ", "/cat.jpg"),
    ],
)
def test_a_redirect_to_an_address_in_raw_letters(web, sent, asked):
    web.pages["/old.jpg"] = lambda handler: handler.wfile.write(
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + sent + b"\r\n\r\n"
    )
    web.pages[asked] = jpeg(0)
    assert Downloader("test", private_hosts=["127.0.0.1"]).fetch(f"{web.url}/old.jpg") == jpeg(0)


@pytest.mark.parametrize("target", ["http://[bad/cat.jpg", "mailto:me@example.org", "http://", "//"])
def test_a_redirect_to_what_is_no_address(web, target):
    web.pages["/cat.jpg"] = redirect(target)
    with pytest.raises(Refused, match=r"no valid http\(s\) address|too many redirects|HTTP status 404"):
        Downloader("test", private_hosts=["127.0.0.1"]).fetch(f"{web.url}/cat.jpg")
