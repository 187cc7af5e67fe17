"""A stand-in of the hub's HTTP API on loopback: it accepts new repositories and commits, and keeps the files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """`files` of the server: path in the repository -> content."""

    def do_GET(self) -> None:
        user = {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        self._answer(user | {"siblings": [], "sha": "0" * 40, "id": "me/model"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://{self.headers['Host']}/me/model"
        action = self.path.split("?")[0]
        if action.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif action.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])  # type: ignore[attr-defined]
            self._answer({"commitUrl": f"{address}/commit/1", "commitOid": "1" * 40, "success": True})
        elif action == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])  # type: ignore[attr-defined]
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"url": address, "name": "me/model", "id": "me/model"})

    def _answer(self, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def hub() -> Iterator[ThreadingHTTPServer]:
    """Run the stand-in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.cards = {}, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
