"""The page at /, and the routes of a conversation's tokens, for the page and for other clients.

Unusual here: the page loads nothing from other servers and runs only its own scripts, which its Content-Security-Policy enforces. Its files
need no API key, because they hold no data: the page requests everything like any other client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from torch import Tensor
from transformers import ProcessorMixin

from moe_llava.common.colours import expert_colour, ink
from moe_llava.model.greedy import end_tokens
from moe_llava.routing.page import as_seen, png_url
from moe_llava.routing.routers import find_routers
from moe_llava.routing.tokens import RoutingError
from moe_llava.routing.trace import Trace, trace_answer
from moe_llava.serving.engine.interface import Work
from moe_llava.serving.engine.requests import Prompt
from moe_llava.serving.http.bodies import Reservation, unless_disconnected
from moe_llava.serving.http.prompts import Fetched
from moe_llava.serving.http.protocol import ApiError, ChatCompletionRequest, VideoPart, media_of
from moe_llava.serving.http.service import Service

logger = logging.getLogger(__name__)

FILES = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files, without an API key."""
    for file in sorted(file for file in FILES.iterdir() if file.suffix in KINDS):
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        app.get(path)(_sender(file.read_bytes(), KINDS[file.suffix]))


def _sender(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return send


def add_routes(guarded: APIRouter, service: Service, processor: ProcessorMixin, examples: Sequence[str]) -> None:
    """Add the endpoints that the page needs in addition to completions."""
    routes = Routes(service, processor, examples)
    guarded.get("/page/settings")(routes.settings)
    guarded.post("/routes")(routes.trace)


class Routes:
    """Trace conversations in the engine's thread."""

    def __init__(self, service: Service, processor: ProcessorMixin, examples: Sequence[str]):
        self._service = service
        self._examples = list(examples)
        self._processor = processor
        self._ends = frozenset(end_tokens(service.engine.model))
        try:
            self._sparse = bool(find_routers(service.engine.model))
        except RoutingError:
            self._sparse = False

    async def settings(self) -> Response:
        """Return the model's name, example questions and the limits, for the page."""
        limits = self._service.limits
        names = ("images", "image_bytes", "pixels", "body_bytes", "new_tokens")
        known = {"model": self._service.name, "sparse": self._sparse, "examples": self._examples}
        return JSONResponse(known | {name: getattr(limits, name) for name in names})

    async def trace(self, client: Request) -> Response:
        """Return the experts of every patch of a conversation's images, and of every token of the answer that ends it."""
        if not self._sparse:
            raise ApiError(400, "the model is dense: it has no experts", code="no_experts")
        with Reservation(self._service.memory) as reservation:
            prompt, begin = await self._service.prepared(client, self._prompt, reservation, with_answer=True)
            reservation.keep(prompt.nbytes)
            self._service.engine.check_prompt(prompt)
            ids = prompt.input_ids
            trace = await self._run(
                client, lambda model, tokenizer: trace_answer(model, tokenizer, ids[:begin], ids[begin:], prompt.inputs)
            )
            metrics = self._service.metrics
            metrics.prompt_tokens.inc(len(ids))
            metrics.requests.labels("routes").inc()
            # In a thread, because it may be some megabytes of JSON.
            return await run_in_threadpool(lambda: JSONResponse(self._body(trace, prompt)))

    def _prompt(self, chat: ChatCompletionRequest, fetched: Fetched) -> tuple[Prompt, int]:
        """Return the prompt of a conversation up to the last token of its last message, an answer, and the index at which that begins."""
        prompts, messages = self._service.prompts, chat.messages
        for part, path in media_of(messages):
            if isinstance(part, VideoPart):
                raise ApiError(400, f"{path}: the routes of a conversation with a video are not shown", path)
        before, whole = prompts.make(messages[:-1], fetched).input_ids, prompts.make(messages, fetched)
        ids = whole.input_ids
        # A chat template may end a prompt with other tokens than it puts before a given answer: the answer begins at the first difference.
        begin = next((index for index, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), min(len(before), len(ids)))
        end = next((index for index in range(begin, len(ids)) if ids[index] in self._ends), len(ids))
        return Prompt(ids[:end], whole.inputs), begin

    async def _run(self, client: Request, work: Work[Trace]) -> Trace:
        """Return or raise the result of `work`. Raises ApiError if the client disconnects first."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Trace] = loop.create_future()
        job = self._service.engine.submit_work(work, lambda result: loop.call_soon_threadsafe(_settle, done, result))
        try:
            return await unless_disconnected(client, done)
        finally:
            job.cancel()

    def _body(self, trace: Trace, prompt: Prompt) -> dict[str, Any]:
        colours = [expert_colour(expert) for expert in range(trace.probs_LTE.shape[-1])]
        pictures = as_seen(prompt.inputs, self._processor, self._service.engine.model.config)
        return {
            "object": "routes",
            "model": self._service.name,
            "layers": trace.layers,
            "experts": len(colours),
            "colours": colours,
            "inks": [ink(colour) for colour in colours],
            "images": [_image(trace, number, png_url(pictures[number])) for number in trace.pictures],
            "answer": {"tokens": _pieces(trace), **_experts(trace, trace.answer_T)},
        }


def _settle(done: asyncio.Future[Trace], result: Trace | Exception) -> None:
    """Deliver the result of the work. Log an error whose client has disconnected."""
    if not isinstance(result, Exception):
        if not done.cancelled():
            done.set_result(result)
    elif done.cancelled():
        logger.error("tracing failed after its client had disconnected", exc_info=result)
    else:
        done.set_exception(result)


def _image(trace: Trace, number: int, picture: str) -> dict[str, Any]:
    patches_T = (trace.places_T3[:, 0] == number) & (trace.places_T3[:, 1] >= 0)  # a class token has no position
    rows, columns = (int(last) + 1 for last in trace.places_T3[patches_T, 1:].max(0).values)
    return {"picture": picture, "rows": rows, "columns": columns, **_experts(trace, patches_T)}


def _experts(trace: Trace, tokens_T: Tensor) -> dict[str, Any]:
    """Return [layers][tokens][experts per token] of the tokens in the mask. A weight is 0 if the expert was full."""
    weights_LTK = trace.weights_LTK[:, tokens_T].double().round(decimals=4)
    return {"experts": trace.ids_LTK[:, tokens_T].tolist(), "weights": weights_LTK.tolist()}


def _pieces(trace: Trace) -> list[str]:
    assert trace.pieces is not None  # the tokenizer was given
    return [piece for piece, answers in zip(trace.pieces, trace.answer_T.tolist(), strict=True) if answers]
