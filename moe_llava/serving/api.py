"""An OpenAI-compatible server over the engine.

Unusual here: a body is taken only as application/json, which a page of another origin cannot send without asking first, and no answer says
that it may; nor is a name of elsewhere taken that leads here. So a browser on this machine is no way in.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moe_llava.routing.tokens import RoutingError
from moe_llava.serving import requests, web
from moe_llava.serving.engine import Engine
from moe_llava.serving.listen import is_loopback
from moe_llava.serving.metrics import Metrics
from moe_llava.serving.prompts import PromptMaker
from moe_llava.serving.protocol import ApiError, ChatCompletionRequest, Limits, parse
from moe_llava.serving.replies import Reply

logger = logging.getLogger(__name__)

RETRY_AFTER = 2  # seconds
LEFT = 499  # the status that some servers log for a client that did not wait


class ClientLeft(Exception):
    """Nobody waits for the answer."""


class Answer:
    """The pieces of one answer, in the event loop. A first token is noted in `metrics`, and every token."""

    def __init__(self, engine: Engine, request: requests.Request, metrics: Metrics, arrival: float):
        """Raises what `Engine.submit` raises."""
        self._pieces: asyncio.Queue[requests.Piece | Exception] = asyncio.Queue()
        self._metrics = metrics
        self._arrival = arrival
        loop = asyncio.get_running_loop()

        def deliver(piece: requests.Piece | Exception) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._cancel = engine.submit(request, deliver)
        metrics.prompt_tokens += len(request.input_ids)
        self.outcome = "cancelled"

    async def pieces(self) -> AsyncIterator[requests.Piece]:
        """Raises what ended the answer before its end."""
        first = True
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if first:
                self._metrics.first_token(time.monotonic() - self._arrival)
            first = False
            self._metrics.completion_tokens += 1
            yield piece
            if piece.finish_reason:
                self.outcome = "200"
                return

    async def leave_with(self, client: Request) -> None:
        """Waits until the client leaves, and ends `pieces` then."""
        while (await client.receive())["type"] != "http.disconnect":
            pass
        self._pieces.put_nowait(ClientLeft())

    async def end(self) -> None:
        """However it ended, its place is free."""
        self._cancel()
        self._metrics.requests[self.outcome] += 1


class Service:
    """What answers requests needs. `name`: of the model."""

    def __init__(self, engine: Engine, processor: Any, name: str, limits: Limits):
        self.engine = engine
        self.name = name
        self.limits = limits
        self.prompts = PromptMaker(processor, limits)
        self.metrics = Metrics()
        self.created = int(time.time())

    async def chat_completions(self, client: Request) -> Response:
        try:
            return await self._complete(client)
        except ApiError as error:
            self.metrics.requests[str(error.status)] += 1
            raise

    async def asked(self, client: Request, answered: bool = False) -> ChatCompletionRequest:
        """The body, parsed. Raises ApiError as `parse` does, or if it is for another model."""
        asked = await run_in_threadpool(parse, await self._body(client), self.limits, answered)
        if asked.model != self.name:
            raise ApiError(404, f"the model is {self.name!r}, not {asked.model[:100]!r}", "model", "model_not_found")
        return asked

    async def models(self) -> Response:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "moe-llava"}
        return JSONResponse({"object": "list", "data": [model]})

    async def metrics_page(self) -> Response:
        text = self.metrics.text(self.engine.running, self.engine.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _complete(self, client: Request) -> Response:
        arrival = time.monotonic()
        asked = await self.asked(client)
        try:
            self.engine.check_room()
            request = await run_in_threadpool(self._request, asked)
            answer = Answer(self.engine, request, self.metrics, arrival)
        except (requests.RequestError, requests.QueueFull, requests.EngineClosed) as error:
            raise api_error(error) from error
        reply = Reply(self.name, len(request.input_ids), bool(asked.logprobs))
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            headers = {"Cache-Control": "no-cache"}
            # The background task runs when the stream ends, and when its client leaves.
            return StreamingResponse(_events(answer, reply, usage), 200, headers, "text/event-stream", BackgroundTask(answer.end))
        return await _whole(client, answer, reply)

    def _request(self, asked: ChatCompletionRequest) -> requests.Request:
        ids, pixels = self.prompts.make(asked.messages)
        longest = asked.longest()
        room = max(1, min(self.limits.new_tokens, self.engine.context - len(ids)))
        return requests.Request(
            input_ids=ids,
            max_new_tokens=room if longest is None else longest,
            pixel_values=pixels,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            stop=asked.stops(),
            top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        )

    async def _body(self, client: Request) -> bytes:
        if client.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be application/json")
        body = bytearray()
        try:
            async for chunk in client.stream():
                body += chunk
                if len(body) > self.limits.body_bytes:
                    raise ApiError(413, f"the body has more than {self.limits.body_bytes} bytes", headers={"Connection": "close"})
        except ClientDisconnect as error:
            raise ApiError(LEFT, "the client left") from error  # nobody reads it
        return bytes(body)


async def _whole(client: Request, answer: Answer, reply: Reply) -> Response:
    watching = asyncio.create_task(answer.leave_with(client))
    try:
        return JSONResponse(reply.whole([piece async for piece in answer.pieces()]))
    except ClientLeft:
        return Response(status_code=LEFT)
    except Exception as error:  # noqa: BLE001  the client is told
        failure = api_error(error)
        answer.outcome = str(failure.status)
        return JSONResponse(failure.body(), failure.status, failure.headers)
    finally:
        watching.cancel()
        await answer.end()


async def _events(answer: Answer, reply: Reply, usage: bool) -> AsyncIterator[str]:
    """Server-sent events."""
    yield _event(reply.first_chunk())
    tokens = 0
    try:
        async for piece in answer.pieces():
            tokens += 1
            if piece.text or piece.logprobs or piece.finish_reason:
                yield _event(reply.chunk(piece))
    except Exception as error:  # noqa: BLE001  the client is told in the stream: the status was sent long ago
        answer.outcome = "failed"
        yield _event(api_error(error).body())
        return
    if usage:
        yield _event(reply.usage_chunk(tokens))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def api_error(error: Exception) -> ApiError:
    """What a client is told of it; what it does not concern is only logged."""
    match error:
        case ApiError():
            return error
        case requests.RequestError() | RoutingError():
            return ApiError(400, str(error))
        case requests.QueueFull():
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(RETRY_AFTER)})
        case requests.TimeLimitExceeded():
            return ApiError(504, str(error), code="timeout")
        case requests.EngineClosed():
            return ApiError(503, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why")


def build_app(engine: Engine, processor: Any, name: str, api_keys: Sequence[str] = (), limits: Limits | None = None) -> FastAPI:
    """The application; it closes `engine` when it ends. With `api_keys`, a client has to send one, except to /health; without, it has to
    be on this machine."""
    service = Service(engine, processor, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    # No pages about the interface: they would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.get("/health")(health)
    guarded = APIRouter(dependencies=[Depends(client_check(api_keys))])
    guarded.get("/metrics")(service.metrics_page)
    guarded.get("/v1/models")(service.models)
    guarded.post("/v1/chat/completions")(service.chat_completions)
    web.add_page(app)
    web.add_routes(guarded, service, processor)
    app.include_router(guarded)
    told = (requests.RequestError, requests.QueueFull, requests.TimeLimitExceeded, requests.EngineClosed, RoutingError)
    for kind, tell in ((ApiError, _refused), (HTTPException, _unknown), *((kind, _failed) for kind in told), (Exception, _failed)):
        app.add_exception_handler(kind, tell)
    return app


def client_check(api_keys: Sequence[str]) -> Callable[[Request], Awaitable[None]]:
    """What raises ApiError for a client that may not come in."""
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def check(client: Request) -> None:
        if not digests and not is_loopback(client.url.hostname or ""):
            raise ApiError(403, "without API keys, this server is reached as localhost or 127.0.0.1 only")
        kind, _, key = client.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [hmac.compare_digest(given, digest) for digest in digests]  # each is compared: the time tells nothing
        if digests and not (kind.lower() == "bearer" and any(found)):
            raise ApiError(
                401, "send an API key: Authorization: Bearer KEY", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    return check


async def health() -> Response:
    return JSONResponse({"status": "ok"})


async def _refused(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _unknown(client: Request, error: Any) -> Response:
    told = ApiError(error.status_code, f"{client.method} {client.url.path[:100]}: {error.detail}", headers=dict(error.headers or {}))
    return await _refused(client, told)


async def _failed(client: Request, error: Exception) -> Response:
    return await _refused(client, api_error(error))
