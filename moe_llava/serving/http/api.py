"""An OpenAI-compatible server over the engine.

Unusual here: a body is accepted only as application/json, which a page of another origin cannot send without a preflight request, and no
response permits it; nor is a foreign host name accepted that resolves to this machine. So a browser on this machine cannot be used to
attack it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from transformers import ProcessorMixin

from moe_llava.checkpoints.offload import Counts
from moe_llava.routing.tokens import RoutingError
from moe_llava.serving.engine import requests
from moe_llava.serving.engine.interface import CompletionEngine
from moe_llava.serving.http import web
from moe_llava.serving.http.fetch import Fetcher
from moe_llava.serving.http.listen import is_loopback
from moe_llava.serving.http.protocol import ApiError, Limits
from moe_llava.serving.http.service import Service

HOST = re.compile(r"(\[.+\]|[^:]*)(?::[0-9]*)?")  # a name or address, and a port
# Registered one by one: starlette raises errors again that only the handler of Exception matches, and uvicorn logs them.
EXPECTED = (ApiError, requests.RequestError, requests.QueueFull, requests.TimeLimitExceeded, requests.EngineClosed, RoutingError)


def build_app(
    engine: CompletionEngine,
    processor: ProcessorMixin,
    name: str,
    limits: Limits,
    api_keys: Sequence[str] = (),
    fetcher: Fetcher | None = None,
    experts: Counts | None = None,
    examples: Sequence[str] = (),
) -> FastAPI:
    """Return the application; it closes `engine` when it ends. With `api_keys`, a client must send one, except for /health and the page's
    files; without, it must be on this machine. `experts`: the counts of a model whose experts are not all in memory. `examples`: questions
    that the page offers; without any, it has its own."""
    service = Service(engine, processor, name, limits, fetcher, experts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)
        service.parsing.close()
        service.preparing.close()

    # FastAPI's pages about the interface would load scripts from other servers.
    everywhere = [] if api_keys else [Depends(check_host)]
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, dependencies=everywhere)
    app.get("/health")(health)
    guarded = APIRouter(dependencies=[Depends(key_check(api_keys))] if api_keys else [])
    guarded.get("/metrics")(service.metrics_page)
    guarded.get("/v1/models")(service.models)
    guarded.post("/v1/chat/completions")(service.chat_completions)
    web.add_page(app)
    web.add_routes(guarded, service, processor, examples)
    app.include_router(guarded)
    app.add_exception_handler(HTTPException, service.on_http_error)
    for kind in (*EXPECTED, Exception):
        app.add_exception_handler(kind, service.on_error)
    return app


async def check_host(client: Request) -> None:
    """Raise ApiError if the client uses a host name that may be another machine's, on any path."""
    name = HOST.fullmatch(client.headers.get("host", ""))
    if not (name and is_loopback(name[1].strip("[]").lower())):
        raise ApiError(403, "without API keys, this server accepts only localhost or 127.0.0.1 as host name")


def key_check(api_keys: Sequence[str]) -> Callable[[Request], Awaitable[None]]:
    """Return a function that raises ApiError for a client that sends none of `api_keys`."""
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def check(client: Request) -> None:
        kind, _, key = client.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [hmac.compare_digest(given, digest) for digest in digests]  # compares all, in constant time
        if not (kind.lower() == "bearer" and any(found)):
            raise ApiError(
                401, "send an API key: Authorization: Bearer KEY", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    return check


async def health() -> Response:
    return JSONResponse({"status": "ok"})
