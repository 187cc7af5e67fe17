"""The bodies of requests, and the memory of all requests together: memory is reserved before it is allocated."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import PriorityQueue
from threading import Thread
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from moe_llava.serving.http.protocol import CLIENT_CLOSED, ApiError, Limits, busy

Reserve = Callable[[int], None]
Result = TypeVar("Result")


@dataclass
class MemoryBudget:
    """Bytes that all requests may hold at once: bodies until they are prepared, then the images' inputs until the completion ends. Used by
    the event loop only."""

    limit: int
    reserved: int = 0


class Reservation:
    """The bytes that one request holds. Leaving the context releases them."""

    def __init__(self, budget: MemoryBudget):
        self._budget = budget
        self._size = 0

    def add(self, size: int) -> None:
        """Reserve more bytes. Raises ApiError (429) if the budget is exceeded."""
        if size > 0 and self._budget.reserved + size > self._budget.limit:
            raise busy(429, f"all requests together may hold {self._budget.limit} bytes; try again later", "busy")
        self._budget.reserved += size
        self._size += size

    def keep(self, size: int) -> None:
        """Hold `size` bytes instead of those that were added. Raises ApiError as `add` does, if these are more."""
        self.add(size - self._size)

    def release(self) -> None:
        """Hold nothing."""
        self.keep(0)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Worker:
    """One thread for the work of all requests, one item at a time. So the memory of one item bounds that of all, and the allocator keeps
    the freed memory of one thread only. The smallest item comes first: a small request waits for one other at most."""

    def __init__(self) -> None:
        self._queue: PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = PriorityQueue()
        self._order = itertools.count()
        self._open = True
        Thread(target=self._work, name="prepare", daemon=True).start()

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
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
                except BaseException as error:  # noqa: BLE001  the caller raises it
                    future.set_exception(error)
            del future, work  # they hold a body and its images, which would otherwise stay in memory until the next item


async def read_body(client: Request, limits: Limits, reserve: Reserve) -> bytearray:
    """Return a body. Raises ApiError if it is not declared as JSON (415), is too large (413) or too slow (408), or if the client
    disconnects (499)."""
    if client.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json")
    try:
        return await asyncio.wait_for(_receive(client, limits.body_bytes, reserve), limits.body_seconds)
    except asyncio.TimeoutError as error:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise ApiError(CLIENT_CLOSED, "the client disconnected") from error


async def unless_disconnected(client: Request, work: Awaitable[Result]) -> Result:
    """Return or raise the result of `work`. If the client, whose body has been read, disconnects first, cancel `work` and raise ApiError
    (499)."""
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_disconnected(client))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_CLOSED, "the client disconnected")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(client: Request) -> None:
    while (await client.receive())["type"] != "http.disconnect":
        pass


async def _receive(client: Request, limit: int, reserve: Reserve) -> bytearray:
    """Receive a body. One that is too large is read to its end if that is near, because many clients read the response only after they have
    sent everything."""
    body, size = bytearray(), 0
    async for chunk in client.stream():
        size += len(chunk)
        if size > 2 * limit:
            break
        if size <= limit:
            reserve(len(chunk))
            body += chunk
    if size > limit:
        raise ApiError(413, f"the body has more than {limit} bytes")
    return body
