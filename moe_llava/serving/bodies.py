"""The bodies of requests, and what they may take together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from moe_llava.serving.protocol import LEFT, RETRY_AFTER, ApiError, Limits

Take = Callable[[int], None]


class Memory:
    """Bytes that clients sent, of all requests that are not prepared yet. Used by the event loop alone."""

    def __init__(self, most: int):
        self._most = most
        self._taken = 0

    @contextmanager
    def share(self) -> Iterator[Take]:
        """What takes so many bytes more, until the end of the context. It raises ApiError (429) if there are not so many."""
        mine = 0

        def take(more: int) -> None:
            nonlocal mine
            if self._taken + more > self._most:
                told = f"requests with {self._most} bytes in all are being read; try again later"
                raise ApiError(429, told, code="busy", headers={"Retry-After": str(RETRY_AFTER)})
            mine += more
            self._taken += more

        try:
            yield take
        finally:
            self._taken -= mine


async def read_body(client: Request, limits: Limits, take: Take) -> bytearray:
    """Raises ApiError if it is no JSON by its name (415), too large (413), or too slow (408), or if the client leaves."""
    if client.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json")
    try:
        return await asyncio.wait_for(_received(client, limits.body_bytes, take), limits.body_seconds)
    except asyncio.TimeoutError as error:
        told = f"the body did not come within {limits.body_seconds:g} seconds"
        raise ApiError(408, told, headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise ApiError(LEFT, "the client left") from error  # nobody reads it


async def until_left(client: Request) -> None:
    """Returns when the client, whose body has been read, has left."""
    while (await client.receive())["type"] != "http.disconnect":
        pass


async def _received(client: Request, most: int, take: Take) -> bytearray:
    """A body that is too large is heard to its end, if it has one not far off: many clients listen only after they have spoken."""
    body, size = bytearray(), 0
    async for chunk in client.stream():
        size += len(chunk)
        if size > 2 * most:
            break
        if size <= most:
            take(len(chunk))
            body += chunk
    if size > most:
        raise ApiError(413, f"the body has more than {most} bytes")
    return body
