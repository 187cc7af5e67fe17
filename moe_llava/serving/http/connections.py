"""The server's connections: how many, how long, and an orderly shutdown.

Unusual here: uvicorn keeps connections open that never send a request or never read the response, and its own errors are not in OpenAI's
format. So its protocol class is subclassed where this is decided.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_llava.serving.engine.interface import CompletionEngine
from moe_llava.serving.http.protocol import ApiError, Limits, busy
from moe_llava.serving.http.replies import error_response

SPARE_CONNECTIONS = 256  # in addition to one for each request: idle ones, scrapers of /metrics, refused ones
READING_SECONDS = 60.0  # for a client to read the end of its response
LINGER_SECONDS = 2.0  # for a refused client to read the error, which would be lost if the connection closed at once


class Connection(H11Protocol):
    """A connection with limits. `max_connections`: further ones get status 503. `head_seconds`: for the head of a request, from the end
    of the one before. `request_seconds`: for everything after the head."""

    def __init__(self, *arguments: Any, max_connections: int, head_seconds: float, request_seconds: float, **settings: Any):
        super().__init__(*arguments, **settings)
        self._max_connections = max_connections
        self._head_seconds = head_seconds
        self._request_seconds = request_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._responding = False
        self._refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_timer(self._head_seconds, self._head_timeout)
        if len(self.connections) > self._max_connections:
            message = f"{self._max_connections} connections are open, the maximum; try again later"
            self._refuse(busy(503, message, "too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        responding = self.cycle is not None and not self.cycle.response_complete
        if responding and not self._responding and not self._refused:
            self._set_timer(self._request_seconds, self.transport.abort)
        self._responding = responding

    def on_response_complete(self) -> None:
        self._responding = False
        self._set_timer(self._head_seconds, self._head_timeout)
        super().on_response_complete()  # may find the next request

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not an HTTP/1.1 request, or its headers are too long"))

    def _should_upgrade(self) -> bool:
        """Handle a request for a web socket like any other. uvicorn would log the advice to install a package."""
        return False

    def _set_timer(self, seconds: float, action: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, action)

    def _head_timeout(self) -> None:
        begun, _ = self.conn.trailing_data
        if begun and self.conn.their_state is h11.IDLE:
            self._refuse(ApiError(408, f"the head of a request did not arrive within {self._head_seconds:g} seconds"))
        else:  # no request has begun
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Send the error, if no response has begun, and close the connection."""
        self._refused = True
        self._set_timer(LINGER_SECONDS, self.transport.abort)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        content = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"} | error.headers
        events = (h11.Response(status_code=error.status, headers=list(headers.items())), h11.Data(data=content), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        try:
            self.transport.write_eof()
        except OSError:  # the client has disconnected
            self.transport.abort()


class SmugglingGuard:
    """Refuse requests that state their length twice. A proxy before the server may use the other length, and take a part of the body for
    the next request (request smuggling)."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        respond: Callable[..., Awaitable[None]] = self._app
        if scope["type"] == "http" and {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            message = "give one of Content-Length and Transfer-Encoding"
            respond = error_response(ApiError(400, message, headers={"Connection": "close"}))
        await respond(scope, receive, send)


def http_server(application: FastAPI, engine: CompletionEngine, limits: Limits) -> uvicorn.Server:
    """Return the server of `application`, with limits on connections."""
    # By then every completion has ended. Clients that do not read it are disconnected.
    request_seconds = limits.body_seconds + limits.fetch_seconds + engine.time_limit + READING_SECONDS
    max_connections = engine.slots + engine.max_waiting + SPARE_CONNECTIONS
    connection = functools.partial(
        Connection, max_connections=max_connections, head_seconds=limits.head_seconds, request_seconds=request_seconds
    )
    return uvicorn.Server(
        uvicorn.Config(
            SmugglingGuard(application),
            http=connection,
            ws="none",
            proxy_headers=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(request_seconds),
        )
    )


def serve_until_signal(server: uvicorn.Server, listening: socket.socket, message: str) -> None:
    """Serve until SIGTERM or Ctrl-C, finish the accepted requests, and exit with status 0. `message`: printed at the start."""
    # uvicorn sends itself the signal again at the end, which would terminate the process with another status.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    print(message, flush=True)
    server.run(sockets=[listening])
