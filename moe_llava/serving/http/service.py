"""Handle requests for chat completions: from a body to the engine, and from its pieces to a reply."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
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
from moe_llava.serving.http.bodies import MemoryBudget, Reservation, Worker, read_body, unless_disconnected
from moe_llava.serving.http.fetch import Fetcher
from moe_llava.serving.http.metrics import Metrics
from moe_llava.serving.http.prompts import Fetched, PromptMaker
from moe_llava.serving.http.protocol import CLIENT_CLOSED, ApiError, ChatCompletionRequest, Limits, busy, media_of, parse
from moe_llava.serving.http.replies import Reply, error_response

logger = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")


class Completion:
    """The pieces of one completion, in the event loop. `metrics` counts its tokens and times the first one."""

    def __init__(self, engine: CompletionEngine, request: requests.Request, metrics: Metrics, arrival: float, reservation: Reservation):
        """Submit a request. Raises what `CompletionEngine.submit` raises."""
        self.tokens = 0
        self.outcome = "cancelled"
        self._pieces: asyncio.Queue[requests.Piece | Exception] = asyncio.Queue()
        self._metrics = metrics
        self._arrival = arrival
        self._reservation = reservation
        loop = asyncio.get_running_loop()
        self._generation = engine.submit(request, lambda piece: loop.call_soon_threadsafe(self._pieces.put_nowait, piece))
        metrics.prompt_tokens.inc(len(request.prompt.input_ids))

    async def pieces(self) -> AsyncIterator[requests.Piece]:
        """Yield the pieces. Raises ApiError if the completion fails."""
        reason = None
        while reason is None:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise api_error(piece) from piece
            if self.tokens == 0:
                self._metrics.time_to_first_token.observe(time.monotonic() - self._arrival)
                self._metrics.reused_tokens.inc(self.reused)
            self.tokens += 1
            self._metrics.completion_tokens.inc()
            yield piece
            reason = piece.finish_reason
        self.outcome = "200"

    @property
    def reused(self) -> int:
        """The number of prompt tokens that were not computed, because an earlier prompt began with them."""
        return self._generation.reused

    async def all_pieces(self) -> list[requests.Piece]:
        """Return all pieces at the end. Raises as `pieces` does."""
        return [piece async for piece in self.pieces()]

    async def end(self) -> None:
        """Free the slot and the memory, however the completion ended."""
        self._generation.cancel()
        self._reservation.release()
        self._metrics.requests.labels(self.outcome).inc()


class Service:
    """Handle requests. `name`: of the model. `fetcher`: None if no URL is fetched. `experts`: None if all are in memory."""

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
        self.memory = MemoryBudget(limits.all_bytes)
        self.parsing, self.preparing = Worker(), Worker()  # one body and one image at a time, so their memory is bounded
        self.prompts = PromptMaker(processor, limits)
        self.metrics = Metrics(engine, experts)
        self.created = int(time.time())

    async def chat_completions(self, client: Request) -> Response:
        arrival = time.monotonic()
        reservation = Reservation(self.memory)
        try:
            reply, request = await self.prepared(client, self._request, reservation)
            reservation.keep(request.prompt.nbytes)
            completion = Completion(self.engine, request, self.metrics, arrival, reservation)
        except BaseException:
            reservation.release()
            raise
        if reply.stream:
            # The background task runs when the stream ends, and when the client disconnects.
            return StreamingResponse(
                _events(completion, reply), 200, {"Cache-Control": "no-cache"}, "text/event-stream", BackgroundTask(completion.end)
            )
        return await _whole(client, completion, reply)

    async def prepared(
        self,
        client: Request,
        prepare: Callable[[ChatCompletionRequest, Fetched], Prepared],
        reservation: Reservation,
        with_answer: bool = False,
    ) -> Prepared:
        """Return the result of `prepare`, which is called in a thread with a client's body and the images and videos that it names.
        `reservation` then holds more than the result, which is all that is kept of a body.

        `with_answer`: the last message must be an answer. Raises ApiError as `parse` does, or if the body is for another model; QueueFull,
        EngineClosed and TimeLimitExceeded.
        """
        chat = await self._parsed(await read_body(client, self.limits, reservation.add), with_answer)
        if chat.model != self.name:
            raise ApiError(404, f"the model is {self.name!r}, not {chat.model[:100]!r}", "model", "model_not_found")
        self.engine.check_queue()
        places = [(part.url, path) for part, path in media_of(chat.messages) if part.url[:8].lower().startswith(("http://", "https://"))]
        fetched = await self.fetcher.fetch(places, reservation.add) if self.fetcher is not None else {}
        needs = await self.parsing.run(0, lambda: self.prompts.needs(chat.messages, fetched))
        reservation.add(needs.kept)
        try:
            preparing = self.preparing.run(needs.working, lambda: prepare(chat, fetched))
            return await asyncio.wait_for(preparing, self.engine.time_limit)
        except asyncio.TimeoutError as error:
            raise requests.TimeLimitExceeded(f"the images were not prepared within {self.engine.time_limit:g} seconds") from error

    async def models(self) -> Response:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "moe-llava"}
        return JSONResponse({"object": "list", "data": [model]})

    async def metrics_page(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def on_error(self, _: Request, error: Exception) -> Response:
        """Return the response to a failed request. All errors are handled here, except those within a stream."""
        known = api_error(error)
        self.metrics.requests.labels(str(known.status)).inc()
        return error_response(known)

    async def on_http_error(self, client: Request, error: HTTPException) -> Response:
        where = f"{client.method[:20]} {client.scope['path'][:100]}"
        return await self.on_error(client, ApiError(error.status_code, f"{where}: {error.detail}", headers=dict(error.headers or {})))

    async def _parsed(self, body: bytearray, with_answer: bool) -> ChatCompletionRequest:
        """Parse a body, which is freed at the end, unlike in the caller."""
        return await self.parsing.run(0, lambda: parse(body, self.limits, with_answer))

    def _request(self, chat: ChatCompletionRequest, fetched: Fetched) -> tuple[Reply, requests.Request]:
        prompt = self.prompts.make(chat.messages, fetched)
        length = len(prompt.input_ids)
        return Reply(self.name, length, chat.stream, chat.stream_options.include_usage, chat.logprobs), requests.Request(
            prompt=prompt,
            max_new_tokens=chat.max_length() or self.engine.clip_length(length, self.limits.new_tokens),
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=chat.seed,
            stop=chat.stop,
            top_logprobs=chat.top_logprobs if chat.logprobs else None,
        )


async def _whole(client: Request, completion: Completion, reply: Reply) -> Response:
    try:
        return JSONResponse(reply.whole(await unless_disconnected(client, completion.all_pieces()), completion.reused))
    except ApiError as error:
        if error.status != CLIENT_CLOSED:
            completion.outcome = str(error.status)
        return error_response(error)
    finally:
        await completion.end()


async def _events(completion: Completion, reply: Reply) -> AsyncIterator[str]:
    """Yield server-sent events. Events of one moment are sent together, because the engine's thread has to wait while the loop sends."""
    unsent = _event(reply.first_chunk())
    try:
        async for piece in completion.pieces():
            if piece.text or piece.logprobs or piece.finish_reason:
                unsent += _event(reply.chunk(piece))
            if unsent and not piece.finish_reason:
                yield unsent
                unsent = ""
    except Exception as error:  # noqa: BLE001  sent within the stream, because the status was sent before; api_error logs it
        completion.outcome = "failed"
        yield unsent + _event(api_error(error).body())
        return
    if reply.with_usage:
        unsent += _event(reply.usage_chunk(completion.tokens, completion.reused))
    yield f"{unsent}data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def api_error(error: Exception) -> ApiError:
    """Return the error that a client gets. Internal details are only logged."""
    match error:
        case ApiError():
            return error
        case requests.ContextError():
            return ApiError(400, str(error), "messages", "context_length_exceeded")
        case requests.RequestError() | RoutingError():
            return ApiError(400, str(error))
        case requests.QueueFull():
            return busy(429, str(error), "queue_full")
        case requests.TimeLimitExceeded():
            return ApiError(504, str(error), code="timeout")
        case requests.EngineClosed():
            return ApiError(503, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log has the details")
