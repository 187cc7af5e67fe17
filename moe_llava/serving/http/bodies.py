"""The bodies of requests, and the memory of all requests together: memory is admitted before it is allocated."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import PriorityQueue
from threading import Thread
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from moe_llava.serving.http.protocol import LEFT, RETRY_AFTER, ApiError, Limits

Take = Callable[[int], None]
Made = TypeVar("Made")


class Memory:
    """Bytes that all requests hold at once: bodies until they are prepared, then the images' inputs until the completion ends. Used by the
    event loop only."""

    def __init__(self, most: int):
        self._most = most
        self._taken = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Hold the bytes of one request until the end of the context."""
        share = Share(self)
        try:
            yield share
        finally:
            share.release()

    def admit(self, more: int) -> None:
        """Count `more` bytes, or raise ApiError (429) if there are not so many."""
        if self._taken + more > self._most:
            told = f"the requests at hand hold as many bytes as may be, {self._most}; try again later"
            raise ApiError(429, told, code="busy", headers={"Retry-After": str(RETRY_AFTER)})
        self._taken += more

    def release(self, bytes_: int) -> None:
        self._taken -= bytes_


class Share:
    """The bytes that one request holds."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._mine = 0

    def take(self, more: int) -> None:
        """Count `more` bytes. Raises ApiError (429) if there are not so many."""
        self._memory.admit(more)
        self._mine += more

    def release(self, but: int = 0) -> None:
        """Give back all but so many bytes."""
        self._memory.release(self._mine - but)
        self._mine = but


class Worker:
    """One thread for the work of all requests, one piece at a time. So the memory of one piece bounds that of all, and the allocator keeps
    the freed memory of one thread only. The smallest piece comes first: a small request waits for one other at most."""

    def __init__(self) -> None:
        self._queue: PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = PriorityQueue()
        self._order = itertools.count()
        self._open = True
        Thread(target=self._work, name="prepare", daemon=True).start()

    async def run(self, size: int, work: Callable[[], Made]) -> Made:
        """Return or raise the result of `work`. `size`: the bytes that it needs meanwhile."""
        return await asyncio.wrap_future(self._put(size, work))

    def close(self) -> None:
        """End the thread when all work is done."""
        self._put(float("inf"), self._end)

    def _put(self, size: float, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((size, next(self._order), future, work))
        return future

    def _end(self) -> None:
        self._open = False

    def _work(self) -> None:
        while self._open:
            *_, future, work = self._queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001  who waits raises it
                    future.set_exception(error)
            del future, work  # they hold a body and its images, which nobody needs until there is more work


async def read_body(client: Request, limits: Limits, take: Take) -> bytearray:
    """Return a body. Raises ApiError if it is not declared as JSON (415), is too large (413) or too slow (408), or the client leaves."""
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
    """Return when the client, whose body has been read, has disconnected."""
    while (await client.receive())["type"] != "http.disconnect":
        pass


async def _received(client: Request, most: int, take: Take) -> bytearray:
    """Receive a body. One that is too large is read to its end if that is near: many clients read the response only after they have sent
    all."""
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
