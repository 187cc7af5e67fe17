"""How many connections there are, and how long; how the server ends."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest

from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.http import connections
from moe_llava.serving.http.listen import listener
from moe_llava.serving.http.protocol import Limits
from tests.conftest import REPOSITORY
from tests.serving import conftest as serving_tests
from tests.serving.conftest import server
from tests.serving.hostile import ask, head
from tests.serving.test_api import assert_told, client_of, complete, eventually, image_part, metric, post, user
from tests.serving.test_hostile import told
from tests.training.conftest import tiny_base  # noqa: F401

LIMITS = Limits(head_seconds=1.0, body_seconds=1.0, body_bytes=100_000, all_bytes=150_000)


def connect(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)


@pytest.fixture
def url(served, monkeypatch):
    model, processor, _ = served
    monkeypatch.setattr(connections, "SPARE_CONNECTIONS", 4)
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.5)
    with server(Engine(model, processor.tokenizer, slots=1, max_waiting=0), processor, LIMITS) as url:
        yield url


def test_who_asks_nothing_is_left(url):
    """At once, or after an answer."""
    with connect(url) as silent, connect(url) as content:
        content.sendall(head(None, "/health", "GET"))
        assert told(content)[0] == 200
        assert silent.recv(1) == content.recv(1) == b""  # within the timeout of `connect`


@pytest.mark.parametrize("first", [b"", head(None, "/health", "GET")])
def test_who_asks_too_slowly_is_told(url, first):
    with connect(url) as slow:
        if first:
            slow.sendall(first)
            assert told(slow)[0] == 200
        for letter in b"GET /hea":
            slow.sendall(bytes([letter]))
            time.sleep(0.1)
        status, headers, body = told(slow)
        assert_told(status, 408, body)
        assert headers["Connection"] == "close"
        assert slow.recv(1) == b""


def test_a_body_may_come_in_parts_but_not_for_ever(url):
    request = ask()
    with connect(url) as parts, connect(url) as slow:
        parts.sendall(request[:-9])
        slow.sendall(request[:-9])
        time.sleep(0.2)
        parts.sendall(request[-9:])
        assert told(parts)[0] == 200
        status, headers, body = told(slow)
        assert_told(status, 408, body)
        assert headers["Connection"] == "close"
    assert metric(url, 'requests_total{outcome="408"}') == 1


def test_beyond_so_many_connections_one_is_told_to_try_again(url):
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(url))
        late = stack.enter_context(connect(url))
        late.sendall(head(None, "/health", "GET"))
        status, headers, body = told(late)
        assert_told(status, 503, body)
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        assert int(headers["Retry-After"]) > 0
    eventually(lambda: post(url, b"", path="/health", method="GET")[0] == 200)


@pytest.fixture
def log():
    """Lines that the server logs, of its own and of the libraries below it."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("asyncio", "uvicorn.error", "moe_llava")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def test_clients_that_are_refused_and_have_gone_leave_no_trace_in_the_log(url, log):
    for _ in range(20):  # of whom most are too many
        with connect(url) as client:
            client.sendall(b"this is no HTTP\r\n\r\n")
    eventually(lambda: post(url, b"", path="/health", method="GET")[0] == 200)
    assert set(log) == {"Invalid HTTP request received."}


@pytest.mark.parametrize("kind", ["websocket", "h2c", "TLS/1.0"])
def test_a_request_for_another_protocol_is_answered_as_any(url, log, kind):
    with connect(url) as client:
        client.sendall(head(None, "/health", "GET", f"Upgrade: {kind}\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"))
        assert told(client)[0] == 200
    assert log == []


def test_bodies_are_bounded_together(url):
    part = head(90_000) + b" " * 80_000
    with connect(url) as first, connect(url) as second:
        first.sendall(part)
        time.sleep(0.2)
        second.sendall(part)
        status, headers, body = told(second)
        assert_told(status, 429, body)
        assert int(headers["Retry-After"]) > 0
        assert told(first)[0] == 408
    with connect(url) as third:
        third.sendall(head(90_000) + b" " * 90_000)
        assert told(third)[0] == 400  # there is room again


def test_a_body_that_is_too_large_is_heard_to_its_end_before_the_answer(url):
    """And the connection is as good as before."""
    with connect(url) as connection:
        connection.sendall(head(150_000) + b" " * 150_000)
        assert told(connection)[0] == 413
        connection.sendall(ask())
        assert told(connection)[0] == 200


def test_who_does_not_read_is_left(served, monkeypatch):
    """What is on its way to another one arrives."""
    model, processor, _ = served
    monkeypatch.setattr(connections, "READING_SECONDS", 0)
    monkeypatch.setattr(serving_tests, "listener", impatient)
    asked, counts = 300, []
    with server(Engine(model, processor.tokenizer, time_limit=0.5), processor, Limits(body_seconds=0.5, fetch_seconds=0)) as url:
        for wait in (0, 2):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
                client.sendall(head(None, "/metrics", "GET") * (asked - 1) + head(None, "/metrics", "GET", "Connection: close\r\n"))
                time.sleep(wait)
                counts.append(b"".join(read(client)).count(b"HTTP/1.1 200"))
    assert counts[0] == asked > counts[1]


@contextmanager
def impatient(host, port):
    """A listener whose connections hold little that was not read."""
    with listener(host, port) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield listening


def read(connection):
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            yield part


def test_sigterm_lets_it_finish_what_it_has_begun(tiny_base, tmp_path):  # noqa: F811
    """And it takes nothing new meanwhile, and ends with status 0. Someone who is connected and asks nothing does not keep it."""
    base = tmp_path / "base"  # whose answers are long
    shutil.copytree(tiny_base / "base", base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": []}))
    command = [sys.executable, "-m", "moe_llava.cli", "serve", base, "--port", "0", "--name", "tiny", "--allow-image-host", "localhost:9"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ})
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny: an API at http://127.0.0.1:")
        url = line.split()[-1]
        _, _, told = post(url, {"model": "tiny", "messages": [user([image_part("http://localhost:9/a.png")])]})
        assert "localhost is not on the public internet" in told.decode()
        idle = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        with client_of(url) as client, idle:
            stream = complete(client, [user()], stream=True, max_tokens=100, stream_options={"include_usage": True})
            chunks = [next(stream)]
            process.send_signal(signal.SIGTERM)
            eventually(lambda: refuses_connections(url))
            chunks += list(stream)
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage.completion_tokens == 100
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def refuses_connections(url):
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
    except ConnectionRefusedError:
        return True
    return False
