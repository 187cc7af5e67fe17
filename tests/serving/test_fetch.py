"""Images from another server: a real one on this machine, which is reached only because the tests say that it may be."""

import asyncio
import json
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.http.fetch import Fetcher, is_public
from moe_llava.serving.http.listen import ServeError
from moe_llava.serving.http.protocol import Limits
from tests.conftest import refused
from tests.serving.conftest import server
from tests.serving.hostile import PNG, data_url
from tests.serving.test_api import assert_told, image_part, post, user
from tests.training.conftest import tiny_base  # noqa: F401

LIMITS = Limits(image_bytes=50_000, fetch_seconds=1.0)


class Pictures(BaseHTTPRequestHandler):
    """Notes what it is asked for in `asked`."""

    asked = None

    def do_GET(self):
        self.asked.append((self.path, dict(self.headers)))
        match self.path.split("?")[0]:
            case "/a.png":
                self.answer(200, PNG)
            case "/moved.png":
                self.answer(302, b"", Location="/a.png")
            case "/page":
                self.answer(200, b"<html>", **{"Content-Type": "image/png"})
            case "/large":
                self.answer(200, b"0" * 60_000)
            case "/half":
                self.answer(200, PNG[:40], **{"Content-Length": len(PNG)})
            case "/endless":
                self.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"0")
            case "/endless-head":
                self.drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n")
            case "/silent":
                time.sleep(1.5)
            case "/rubbish":
                self.wfile.write(b"\0\1\2\3 rubbish\r\n\r\n")
            case _:
                self.answer(404, PNG)

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def drip(self, first, again):
        """For longer than anybody waits."""
        try:
            self.wfile.write(first)
            for _ in range(15):
                self.wfile.write(again)
                time.sleep(0.1)
        except OSError:  # nobody waits
            pass

    def log_message(self, *_):
        pass


@contextmanager
def pictures(tls=None):
    """(the port of a server, what it was asked for)"""
    asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Noting", (Pictures,), {"asked": asked})) as serving:
        if tls:
            serving.socket = tls.wrap_socket(serving.socket, server_side=True)
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving.server_address[1], asked
        serving.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def place():
    with pictures() as (port, asked):
        yield f"http://localhost:{port}", asked


@pytest.fixture(scope="module")
def url(served, place):
    model, processor, _ = served
    fetcher = Fetcher([place[0].removeprefix("http://"), "nowhere.invalid"], LIMITS, is_allowed=lambda address: True)
    with server(Engine(model, processor.tokenizer), processor, LIMITS, fetcher=fetcher) as url:
        yield url


def show(url, *images):
    body = {
        "model": "tiny",
        "messages": [user([image_part(image) for image in images])],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
    }
    return post(url, body)


def test_an_image_of_a_host_that_was_named_is_as_good_as_one_that_is_sent(url, place):
    at, asked = place
    status, _, fetched = show(url, f"{at}/a.png?size=1", data_url(PNG), f"{at}/a.png?size=1")
    assert status == 200, fetched
    assert [path for path, _ in asked] == ["/a.png?size=1"]
    assert asked[0][1]["Host"] == at.removeprefix("http://")
    sent = show(url, *[data_url(PNG)] * 3)[2]
    (one,), (other,) = (json.loads(body)["choices"] for body in (fetched, sent))
    assert one["message"] == other["message"]
    logprobs = [[token["logprob"] for token in choice["logprobs"]["content"]] for choice in (one, other)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)  # the second prompt is not computed as a whole


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/moved.png", "status 302"),
        ("/gone.png", "status 404"),
        ("/page", "is broken, or none of PNG"),
        ("/large", "more than 50000 bytes"),
        ("/half", "cannot be fetched"),
        ("/rubbish", "cannot be fetched"),
        ("/endless", "within 1 seconds"),
        ("/endless-head", "within 1 seconds"),
        ("/silent", "within 1 seconds"),
    ],
)
def test_what_cannot_be_taken_is_told(url, place, path, why):
    at, asked = place
    asked.clear()
    status, _, told = show(url, at + path)
    assert_told(status, 400, told)
    assert why in told.decode()
    together = why.startswith("within")  # the time of all images of a request
    assert json.loads(told)["error"]["param"] == ("messages" if together else "messages.0.content.0.image_url")
    assert [path for path, _ in asked] == [path]


def test_no_other_place_is_asked(url, place):
    at, asked = place
    asked.clear()
    port = at.rpartition(":")[2]
    others = [
        f"http://127.0.0.1:{port}/a.png",
        f"http://localhost:{int(port) ^ 1}/a.png",
        f"http://a@localhost:{port}/a.png",
        f"http://localhost.:{port}/",
    ]
    others += [
        f"http://localhost:{port}@other/a.png",
        "http://localhost/a.png",
        "http://[::1/a.png",
        "http://localhost:x/",
        f"{at}/\u00e4.png",
        f"{at}/ a",
    ]
    others += [
        f"file://localhost:{port}/a.png",
        f"ftp://localhost:{port}/a.png",
        f"//localhost:{port}/a.png",
        f"{at}/" + "a" * 3000,
        "https:/x",
        "http://",
    ]
    for other in others:
        status, _, told = show(url, other)
        assert_told(status, 400, told)
    assert show(url, "http://nowhere.invalid/a.png")[0] == 400
    assert show(url, at.replace("http:", "https:") + "/a.png")[0] == 400  # it does not speak TLS
    assert not [path for path, _ in asked]


def test_a_certificate_has_to_be_of_the_host(served, tmp_path, monkeypatch):
    """One that nobody vouches for, one of another name, and the right one."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    model, processor, _ = served
    statuses = []
    for name, trusted in (("localhost", False), ("other.example", True), ("localhost", True)):
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        subprocess.run([*make, "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"], check=True, capture_output=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate") if trusted else "")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
        with pictures(tls) as (port, _):
            fetcher = Fetcher([f"localhost:{port}"], LIMITS, is_allowed=lambda address: True)
            with server(Engine(model, processor.tokenizer), processor, LIMITS, fetcher=fetcher) as url:
                statuses.append(show(url, f"https://localhost:{port}/a.png")[0])
    assert statuses == [400, 400, 200]


def test_networks_behind_the_server_are_not_asked(served, place):
    at, asked = place
    asked.clear()
    model, processor, _ = served
    fetcher = Fetcher([at.removeprefix("http://")], LIMITS)
    with server(Engine(model, processor.tokenizer), processor, LIMITS, fetcher=fetcher) as url:
        status, _, told = show(url, f"{at}/a.png")
    assert_told(status, 400, told)
    assert "not on the public internet" in told.decode()
    assert not asked


def test_a_name_is_resolved_once(url, place, monkeypatch):
    """And whoever answers otherwise a moment later is not heard."""
    at, asked = place
    asked.clear()
    resolved = []
    ask = asyncio.BaseEventLoop.getaddrinfo

    async def rebinding(loop, host, *arguments, **settings):
        resolved.append(host)
        return await ask(loop, host if len(resolved) == 1 else "nowhere.invalid", *arguments, **settings)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rebinding)
    assert show(url, f"{at}/a.png")[0] == 200
    assert resolved == ["localhost"]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "240.0.0.1",
    ]
    + [
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "2001:0:a00:1::",
    ]
    + ["2001:db8::1", "::10.0.0.1"],
)
def test_addresses_that_are_not_of_the_internet(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "2a00:1450:4001::200e"])
def test_addresses_of_the_internet(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["", "http://a.example", "a.example/b", "a b", "*", "a.example:0", "a.example:99999", "[::1]", "." * 3, "a" * 64]
)
def test_what_is_no_host(host, tiny_base):  # noqa: F811
    with pytest.raises(ServeError, match="--allow-image-host must be a name"):
        Fetcher([host], LIMITS)
    assert "--allow-image-host must be a name" in refused("serve", tiny_base / "base", "--port", "0", "--allow-image-host", host)
