"""The address of a server and its API keys, checked before a model is loaded."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path


class ServeError(ValueError):
    """The server cannot start; the message names the value and the rule."""


def read_keys(path: Path | None, host: str) -> list[str]:
    """Return the API keys in a file, one per line.

    Raises ServeError if there is none but `host` is reached by other machines, or if the file has none.
    """
    if path is None:
        if not is_loopback(host):
            raise ServeError(f"--host {host} admits other machines: give --api-keys FILE, or listen on 127.0.0.1")
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ServeError(f"{path} must hold API keys, one per line, but is not text in UTF-8") from error
    if not keys:
        raise ServeError(f"{path} must hold API keys, one per line, but has none")
    return keys


def listener(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ServeError if that fails, or if a package of the server is not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ServeError(f"serving needs {', '.join(missing)}: pip install -e '.[serve]'")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServeError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # Connections inherit it. Without it the end of each response waits 40 ms, until the client has acknowledged its beginning.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def is_loopback(host: str) -> bool:
    """Return whether this name or address, without brackets, always means this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False
