"""A server of chat completions on loopback, with the replies of a test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Told:
    """A response: the `text` of a reply, or any `body`."""

    text: str | None = None
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110})

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        return json.dumps({"model": "served-name", "choices": [{"message": message}], "usage": self.usage}).encode()


@dataclass
class Served:
    """A running server: its base URL, and the requests so far, with headers, in order."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)

    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]


@contextmanager
def serving(respond: Callable[[str, int], Told], refusals: Mapping[str, Told] | None = None) -> Iterator[Served]:
    """Serve `respond(last message, its earlier requests)`. `refusals`: the response to a request with a parameter."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][-1]["content"]
            with lock:
                refused = [told for name, told in (refusals or {}).items() if name in request]
                told = refused[0] if refused else respond(prompt, served.prompts().count(prompt))
                served.requests.append(request | {"path": self.path, "headers": dict(self.headers)})
            time.sleep(told.seconds)
            content = told.content()
            try:
                self.send_response(told.status)
                for name, value in ({"Content-Length": str(len(content))} | told.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass  # the client waited no longer

        def log_message(self, *_: Any) -> None:
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
