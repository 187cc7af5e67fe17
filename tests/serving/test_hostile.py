"""A thousand requests that mean no good, to a real server that is watched meanwhile."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from tests.serving.hostile import HONEST, PLAIN, by_hand, data_url, encoded, flat, post, random_requests, show
from tests.training.conftest import tiny_base  # noqa: F401

pytestmark = pytest.mark.slow

# Bytes beyond those of the server before, as docs/serving.md has it: what requests hold, one body that is parsed, and one image.
MOST_MEMORY = 1.1e9
RANDOM = 800


class Watched:
    """A server in a process of its own."""

    def __init__(self, process):
        self.process = process
        self.port = int(process.stdout.readline())

    def connect(self, seconds=20):
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def answer(self, request, seconds=20):
        """(status, headers, body); None if the connection was closed without one, or none came in time."""
        with self.connect(seconds) as connection:
            with contextlib.suppress(OSError):  # it may be closed in the midst, after an answer
                connection.sendall(request)
            return told(connection, request)

    def leave(self, request):
        """Says a part of it, or all, and goes."""
        with self.connect() as connection:
            connection.sendall(request)

    def order(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def seen(self):
        self.order("tell")
        return json.loads(self.process.stdout.readline())

    def memory(self, name):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024

    def forget_peak(self):
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


def told(connection, request=b"GET "):
    response = HTTPResponse(connection, method=request.partition(b" ")[0].decode("latin-1"))
    try:
        response.begin()
        return response.status, response.headers, response.read()
    except (HTTPException, OSError):
        return None


@pytest.fixture(scope="module")
def watched(tiny_base, tmp_path_factory):  # noqa: F811
    log = tmp_path_factory.mktemp("watched") / "log"
    command = [sys.executable, "-m", "tests.serving.watched_server", str(tiny_base / "base")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=REPOSITORY, env=environment
        )
    try:
        yield Watched(process)
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.communicate()


def honest(watched):
    status, _, body = watched.answer(post(HONEST))
    assert status == 200, body
    return json.loads(body)["choices"]


def wrong_with(answer, expected=None):
    """What is wrong with an answer; None if nothing is."""
    if answer is None:
        return "no answer"
    status, headers, body = answer
    if status >= 500 or (expected and status not in expected):
        return f"status {status}: {body[:200]}"
    if status < 400 or not body:
        return None
    error = json.loads(body)["error"]
    if set(error) != {"message", "type", "param", "code"} or not 5 < len(error["message"]) <= 500 or len(error["param"] or "") > 100:
        return f"not OpenAI's form: {body[:200]}"
    shows = [word for word in ("Traceback", "site-packages", ".py", "root:", "object at") if word in error["message"]]
    return f"shows {shows}: {body[:200]}" if shows or "application/json" not in headers["Content-Type"] else None


def test_a_thousand_hostile_requests(watched):
    handmade = by_hand()
    requests = {f"random {number}": (request, None) for number, request in enumerate(random_requests(RANDOM))} | handmade
    assert len(requests) >= 1000
    honest(watched)  # from now on its beginning is in the prefix cache, which changes the rounding of log probabilities
    before = honest(watched)
    for form in ("PNG", "JPEG", "GIF", "WEBP"):  # loads what decodes them
        assert wrong_with(watched.answer(handmade[f"whole {form} {{}}"][0]), {200}) is None
    watched.answer(handmade["no HTTP"][0])
    memory = watched.memory("VmRSS")
    watched.forget_peak()
    watched.order("watch")
    with ThreadPoolExecutor(12) as pool:
        found = dict(zip(requests, pool.map(lambda case: wrong_with(watched.answer(case[0]), case[1]), requests.values()), strict=True))
        wrong = {name: what for name, what in found.items() if what}
        whole = post(HONEST)
        list(pool.map(watched.leave, [*(whole[:part] for part in range(1, len(whole), 40)), *[whole] * 20]))
    assert honest(watched) == before
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
    assert watched.seen() == []
    grown = watched.memory("VmHWM") - memory
    assert grown < MOST_MEMORY, f"{grown / 2**20:.0f} MiB more"


def large_image(kind):
    """Within the limits, with about as many pixels as may be."""
    canvas = Image.new("RGB", (5000, 5000), "red")
    turned = Image.Exif()
    turned[0x0112] = 6
    match kind:
        case "PNG":
            return flat(5000, 5000)
        case "photograph, progressive and sideways":
            return encoded(canvas, "JPEG", progressive=True, subsampling=0, exif=turned)
        case "animation":
            return encoded(canvas, "WEBP", lossless=True, method=0, save_all=True, append_images=[Image.new("RGB", canvas.size)])
        case "oblong PNG":
            return flat(6144, 4000)
        case "long PNG":
            return flat(70_000, 355)
        case "PNG that ends early":
            return encoded(canvas)[:-60]


@pytest.mark.parametrize(
    ("kind", "number", "most", "status"),
    [
        ("PNG", 20, 500e6, 200),
        ("photograph, progressive and sideways", 4, 500e6, 200),
        ("animation", 4, 600e6, 200),
        ("oblong PNG", 4, 750e6, 200),
        ("long PNG", 4, 750e6, 200),
        ("PNG that ends early", 10, 500e6, 400),
    ],
)
def test_many_large_images_at_once(watched, kind, number, most, status):
    """They are prepared one after another; a small request comes before those that wait."""
    for form in ("PNG", "JPEG", "WEBP"):  # loads what decodes them
        assert wrong_with(watched.answer(show_small(form)), {200}) is None
    request = show(data_url(large_image(kind)))
    memory = watched.memory("VmRSS")
    watched.forget_peak()
    with ThreadPoolExecutor(number) as pool:
        large = [pool.submit(watched.answer, request, 120) for _ in range(number)]
        assert wrong_with(watched.answer(show_small("PNG")), {200}) is None
        waiting = sum(not one.done() for one in large)
        assert {one.result()[0] for one in large} == {status}
    assert waiting >= number // 2
    grown = watched.memory("VmHWM") - memory
    assert grown < most, f"{grown / 2**20:.0f} MiB more"


def show_small(form):
    return show(data_url(encoded(PLAIN, form)))


def test_the_watch_sees(watched):
    watched.order("watch")
    watched.order("open")
    assert [what.split()[0] for what in watched.seen()] == ["open"]
