"""Fetch images and videos from other servers, only from the hosts that the server was started with.

Unusual here: a name is resolved once, each of its addresses is checked, and the connection goes to a checked address. So a name that
resolves to another address a moment later (DNS rebinding) has no effect. Redirects are not followed, and proxies of the environment are not
used.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

import h11

from moe_llava.serving.http.bodies import Reserve
from moe_llava.serving.http.listen import ServeError
from moe_llava.serving.http.protocol import Limits, MessagesError

PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"([a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*)(?::([0-9]{1,5}))?")
URL = re.compile(r"https?://[\x21-\x7e]{1,2000}", re.IGNORECASE)
CHUNK = 1 << 16  # bytes


def is_public(address: str) -> bool:
    """Return whether this is an address of the public internet: not of this machine or a network behind it, and none that embeds another
    address."""
    parsed = ip_address(address.partition("%")[0])
    # Of IPv6, only 2000::/3 is global unicast, and 6to4 in it embeds another address.
    if isinstance(parsed, IPv6Address) and (parsed.sixtofour or int(parsed) >> 125 != 1):
        return False
    return parsed.is_global and not parsed.is_multicast


class Fetcher:
    """Fetch from `hosts`, each a name or name:port; without a port, from the ports of http and https. `is_allowed` checks an address.

    Raises ServeError if a host is not a name.
    """

    def __init__(self, hosts: Sequence[str], limits: Limits, is_allowed: Callable[[str], bool] = is_public):
        self._limits = limits
        self._is_allowed = is_allowed
        self._allowed = {server for host in hosts for server in _servers(host)}
        self._tls = ssl.create_default_context()  # reads files, once

    async def fetch(self, places: Sequence[tuple[str, str]], reserve: Reserve) -> dict[str, bytes]:
        """Return the content of each URL. `places`: URLs, each with its path in the body. The time limit is for all together.

        Raises MessagesError if one is not allowed or cannot be fetched.
        """
        try:
            return await asyncio.wait_for(self._fetch_all(places, reserve), self._limits.fetch_seconds)
        except asyncio.TimeoutError as error:
            raise MessagesError(f"the images did not arrive within {self._limits.fetch_seconds:g} seconds") from error

    async def _fetch_all(self, places: Sequence[tuple[str, str]], reserve: Reserve) -> dict[str, bytes]:
        fetched: dict[str, bytes] = {}
        for url, path in places:
            try:
                fetched[url] = fetched[url] if url in fetched else await self._fetch_one(url, reserve)
            except MessagesError as error:
                raise MessagesError(f"{path}: {error}", path) from error
        return fetched

    async def _fetch_one(self, url: str, reserve: Reserve) -> bytes:
        scheme, host, port, target = self._split(url)
        try:
            address = await self._resolve(host, port)
            tls = self._tls if scheme == "https" else None
            reader, writer = await asyncio.open_connection(address, port, ssl=tls, server_hostname=host if tls else None)
            try:
                authority = host if port == PORTS[scheme] else f"{host}:{port}"
                return await self._get(reader, writer, authority, target, reserve)
            finally:
                writer.transport.abort()
        except (OSError, h11.RemoteProtocolError) as error:
            raise MessagesError(f"{url[:100]} cannot be fetched from {host}: {error}"[:300]) from error

    def _split(self, url: str) -> tuple[str, str, int, str]:
        """Return (scheme, host, port, path and query) of a URL."""
        try:
            parts = urlsplit(url) if URL.fullmatch(url) else None
            scheme, host, port = (parts.scheme, parts.hostname or "", parts.port) if parts else ("", "", None)
        except ValueError as error:  # an invalid port or address
            raise MessagesError(f"{url[:100]!r} is not a URL: {error}"[:300]) from error
        if parts is None or "@" in parts.netloc or (scheme, host, port or PORTS[scheme]) not in self._allowed:
            raise MessagesError(f"images are not fetched from the host of {url[:100]!r}")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return scheme, host, port or PORTS[scheme], target

    async def _resolve(self, host: str, port: int) -> str:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(endpoint[0]) for *_, endpoint in found]
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise MessagesError(f"{host} is not on the public internet: images are not fetched from networks behind this server")
        return addresses[0]

    async def _get(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, authority: str, target: str, reserve: Reserve
    ) -> bytes:
        connection = h11.Connection(h11.CLIENT)
        headers = {
            "Host": authority,
            "User-Agent": "moe-llava",
            "Accept": "image/*, video/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=list(headers.items()))) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        content = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(CHUNK))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise MessagesError(f"{authority} responded with status {event.status_code}, not 200; redirects are not followed")
            elif isinstance(event, h11.Data):
                reserve(len(event.data))
                content += event.data
                if len(content) > self._limits.image_bytes:
                    raise MessagesError(f"an image from {authority} has more than {self._limits.image_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)


def _servers(host: str) -> list[tuple[str, str, int]]:
    """Return (scheme, name, port) of the servers that an option allows."""
    found = HOST.fullmatch(host.lower())
    if found is None or not 0 < int(found[2] or 1) < 65536:
        raise ServeError(f"--allow-image-host must be a name such as images.example.org, or name:port, but is {host!r}")
    return [(scheme, found[1], int(found[2] or port)) for scheme, port in PORTS.items()]
