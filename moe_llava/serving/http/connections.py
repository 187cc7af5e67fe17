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
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_llava.serving.engine.interface import CompletionEngine
from moe_llava.serving.http.protocol import RETRY_AFTER, ApiError, Limits

SPARE_CONNECTIONS = 256  # beyond one for each answer: who is about to ask, watches, or was refused
READING_SECONDS = 60.0  # for a client to read the end of its answer
LINGER_SECONDS = 2.0  # for a client that is refused to read why: a connection that closes at once loses what is on its way


class Connection(H11Protocol):
    """A connection with limits. `most`: connections; later ones get status 503. `head_seconds`: for a request's head, from the end of the
    one before. `longest`: seconds for everything after it."""

    def __init__(self, *arguments: Any, most: int, head_seconds: float, longest: float, **settings: Any):
        super().__init__(*arguments, **settings)
        self._most = most
        self._head_seconds = head_seconds
        self._longest = longest
        self._timer: asyncio.TimerHandle | None = None
        self._answering = False
        self._refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._within(self._head_seconds, self._late)
        if len(self.connections) > self._most:
            told = f"{self._most} connections are open, as many as may be; try again later"
            self._refuse(ApiError(503, told, code="too_many_connections", headers={"Retry-After": str(RETRY_AFTER)}))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self._answering and not self._refused:
            self._within(self._longest, self.transport.abort)
        self._answering = answering

    def on_response_complete(self) -> None:
        self._answering = False
        self._within(self._head_seconds, self._late)
        super().on_response_complete()  # may find the next request

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is no request of HTTP/1.1, or its headers are too long"))

    def _should_upgrade(self) -> bool:
        """Answer a request for a web socket as any other, without a line in the log that advises to install one."""
        return False

    def _within(self, seconds: float, otherwise: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, otherwise)

    def _late(self) -> None:
        begun, _ = self.conn.trailing_data
        if begun and self.conn.their_state is h11.IDLE:
            self._refuse(ApiError(408, f"the head of a request did not come within {self._head_seconds:g} seconds"))
        else:  # nothing was asked
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Send the error, if no response has begun, and close the connection."""
        self._refused = True
        self._within(LINGER_SECONDS, self.transport.abort)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        content = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"} | error.headers
        events = (h11.Response(status_code=error.status, headers=list(headers.items())), h11.Data(data=content), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        try:
            self.transport.write_eof()
        except OSError:  # the client has gone already, and nobody is left to tell
            self.transport.abort()


class OneLength:
    """Pass on only requests that state their length once. With two lengths, a proxy before the server may use the other one, and take a
    request within a request for the next (request smuggling)."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        answer: Callable[..., Awaitable[None]] = self._app
        if scope["type"] == "http" and {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            error = ApiError(400, "give one of Content-Length and Transfer-Encoding")
            answer = JSONResponse(error.body(), error.status, {"Connection": "close"})
        await answer(scope, receive, send)


def http_server(application: FastAPI, engine: CompletionEngine, limits: Limits) -> uvicorn.Server:
    """Return the server of `application`, with limits on connections, which `application` does not see."""
    # By then every answer is complete, or was ended. Who does not read it is not waited for.
    longest = limits.body_seconds + limits.fetch_seconds + engine.time_limit + READING_SECONDS
    most = engine.slots + engine.max_waiting + SPARE_CONNECTIONS
    connection = functools.partial(Connection, most=most, head_seconds=limits.head_seconds, longest=longest)
    return uvicorn.Server(
        uvicorn.Config(
            OneLength(application),
            http=connection,
            ws="none",
            proxy_headers=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(longest),
        )
    )


def serve_until_told(server: uvicorn.Server, listening: socket.socket, told: str) -> None:
    """Serve until SIGTERM or Ctrl-C, finish what has begun, and exit with status 0. `told`: printed once the server listens."""
    # uvicorn sends itself the signal once more when all is done, which would end the process by it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    print(told, flush=True)
    server.run(sockets=[listening])
