"""Chat completions over HTTP: from a request to the engine and back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from transformers import ProcessorMixin

from moe_llava.checkpoints.offload import Counts
from moe_llava.routing.tokens import RoutingError
from moe_llava.serving.engine import requests
from moe_llava.serving.engine.interface import CompletionEngine
from moe_llava.serving.http.bodies import Memory, Share, Take, Worker, read_body, until_left
from moe_llava.serving.http.fetch import Fetcher
from moe_llava.serving.http.metrics import Metrics
from moe_llava.serving.http.prompts import PromptMaker
from moe_llava.serving.http.protocol import LEFT, RETRY_AFTER, ApiError, ChatCompletionRequest, Limits, image_urls, parse
from moe_llava.serving.http.replies import Reply

logger = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")
Fetched = Mapping[str, bytes]  # URL -> what it leads to


class ClientLeft(Exception):
    """The client disconnected."""


class Answer:
    """The pieces of one completion, in the event loop. `metrics` counts its tokens and times the first. `release`: called at the end."""

    def __init__(self, engine: CompletionEngine, request: requests.Request, metrics: Metrics, arrival: float, release: Callable[[], None]):
        """Submit a request. Raises what `Engine.submit` raises."""
        self._pieces: asyncio.Queue[requests.Piece | Exception] = asyncio.Queue()
        self._metrics = metrics
        self._arrival = arrival
        self._release = release
        loop = asyncio.get_running_loop()

        def deliver(piece: requests.Piece | Exception) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._generation = engine.submit(request, deliver)
        metrics.prompt_tokens.inc(len(request.prompt.input_ids))
        self.outcome = "cancelled"

    async def pieces(self) -> AsyncIterator[requests.Piece]:
        """Yield the pieces. Raises ApiError if the completion fails, ClientLeft if the client disconnects."""
        first = True
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, ClientLeft):
                raise piece
            if isinstance(piece, Exception):
                raise api_error(piece) from piece
            if first:
                self._metrics.time_to_first_token.observe(time.monotonic() - self._arrival)
            first = False
            self._metrics.completion_tokens.inc()
            yield piece
            if piece.finish_reason:
                self.outcome = "200"
                return

    async def leave_with(self, client: Request) -> None:
        """Wait until the client disconnects, and end `pieces` then."""
        await until_left(client)
        self._pieces.put_nowait(ClientLeft())

    async def end(self) -> None:
        """Free the slot, however the completion ended."""
        self._generation.cancel()
        self._release()
        self._metrics.requests.labels(self.outcome).inc()


@dataclass(frozen=True)
class Form:
    """How a completion is returned: as a stream, with its usage at the end, with logprobs."""

    stream: bool
    usage: bool
    logprobs: bool


class Service:
    """All that answers requests. `name`: of the model. `fetcher`: None if no URL is fetched. `experts`: None if all are in memory."""

    def __init__(
        self,
        engine: CompletionEngine,
        processor: ProcessorMixin,
        name: str,
        limits: Limits,
        fetcher: Fetcher | None,
        experts: Counts | None,
    ):
        self.engine = engine
        self.name = name
        self.limits = limits
        self.fetcher = fetcher
        self.memory = Memory(limits.all_bytes)
        self.parsing, self.preparing = Worker(), Worker()  # what one body and one image unfold to is bounded, and so that of all
        self.prompts = PromptMaker(processor, limits)
        self.metrics = Metrics(engine, experts)
        self.created = int(time.time())

    async def chat_completions(self, client: Request) -> Response:
        arrival = time.monotonic()
        with ExitStack() as held:
            share = held.enter_context(self.memory.share())
            form, request = await self.prepared(client, self._request, share)
            answer = Answer(self.engine, request, self.metrics, arrival, share.release)
            held.pop_all()  # from here on the answer holds the share
        reply = Reply(self.name, len(request.prompt.input_ids), form.logprobs)
        if form.stream:
            headers = {"Cache-Control": "no-cache"}
            # The background task runs when the stream ends, and when its client leaves.
            return StreamingResponse(_events(answer, reply, form.usage), 200, headers, "text/event-stream", BackgroundTask(answer.end))
        return await _whole(client, answer, reply)

    async def prepared(
        self, client: Request, prepare: Callable[[ChatCompletionRequest, Fetched], Prepared], share: Share, answered: bool = False
    ) -> Prepared:
        """Return what `prepare` makes, in a thread, of a client's body and of the images that it names. Nothing else of a body is kept:
        `share` then holds the bytes of the images' inputs.

        `answered`: the last message must be an answer. Raises ApiError as `parse` does, or if the body is for another model; QueueFull,
        EngineClosed and TimeLimitExceeded.
        """
        asked = await self._parsed(await read_body(client, self.limits, share.take), answered)
        if asked.model != self.name:
            raise ApiError(404, f"the model is {self.name!r}, not {asked.model[:100]!r}", "model", "model_not_found")
        self.engine.check_queue()
        fetched = await self._fetched(asked, share.take)
        needs = await self.parsing.run(0, lambda: self.prompts.needs(asked.messages, fetched))
        share.take(needs.kept)
        try:
            preparing = self.preparing.run(needs.working, lambda: prepare(asked, fetched))
            prepared = await asyncio.wait_for(preparing, self.engine.time_limit)
        except asyncio.TimeoutError as error:
            raise requests.TimeLimitExceeded(f"the images were not prepared within {self.engine.time_limit:g} seconds") from error
        share.release(but=needs.kept)
        return prepared

    async def models(self) -> Response:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "moe-llava"}
        return JSONResponse({"object": "list", "data": [model]})

    async def metrics_page(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def refused(self, _: Request, error: ApiError) -> Response:
        """Return the response to a failed request. All errors are sent here, except those within a stream."""
        self.metrics.requests.labels(str(error.status)).inc()
        return _told(error)

    async def unknown(self, client: Request, error: HTTPException) -> Response:
        where = f"{client.method[:20]} {client.scope['path'][:100]}"
        return await self.refused(client, ApiError(error.status_code, f"{where}: {error.detail}", headers=dict(error.headers or {})))

    async def failed(self, client: Request, error: Exception) -> Response:
        return await self.refused(client, api_error(error))

    async def _parsed(self, body: bytearray, answered: bool) -> ChatCompletionRequest:
        return await self.parsing.run(0, lambda: parse(body, self.limits, answered))

    async def _fetched(self, asked: ChatCompletionRequest, take: Take) -> Fetched:
        urls = [url for url, _ in image_urls(asked.messages) if url[:8].lower().startswith(("http://", "https://"))]
        return await self.fetcher.fetch(urls, take) if self.fetcher is not None else {}

    def _request(self, asked: ChatCompletionRequest, fetched: Fetched) -> tuple[Form, requests.Request]:
        form = Form(asked.stream, asked.stream_options.include_usage, asked.logprobs)
        prompt = self.prompts.make(asked.messages, fetched)
        return form, requests.Request(
            prompt=prompt,
            max_new_tokens=asked.longest() or self.engine.clip_length(len(prompt.input_ids), self.limits.new_tokens),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=asked.stop,
            top_logprobs=asked.top_logprobs if asked.logprobs else None,
        )


async def _whole(client: Request, answer: Answer, reply: Reply) -> Response:
    watching = asyncio.create_task(answer.leave_with(client))
    try:
        return JSONResponse(reply.whole([piece async for piece in answer.pieces()]))
    except ClientLeft:
        return Response(status_code=LEFT)
    except ApiError as error:
        answer.outcome = str(error.status)
        return _told(error)
    finally:
        watching.cancel()
        await answer.end()


async def _events(answer: Answer, reply: Reply, usage: bool) -> AsyncIterator[str]:
    """Send server-sent events. Events of one moment are sent together, because the engine's thread has to wait while the loop sends."""
    unsent = _event(reply.first_chunk())
    tokens = 0
    try:
        async for piece in answer.pieces():
            tokens += 1
            if piece.text or piece.logprobs or piece.finish_reason:
                unsent += _event(reply.chunk(piece))
            if unsent and not piece.finish_reason:
                yield unsent
                unsent = ""
    except ApiError as error:  # told in the stream: the status was sent long ago
        answer.outcome = "failed"
        yield unsent + _event(error.body())
        return
    if usage:
        unsent += _event(reply.usage_chunk(tokens))
    yield f"{unsent}data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def api_error(error: Exception) -> ApiError:
    """Return the error that a client gets. Internal details are only logged."""
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


def _told(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)
