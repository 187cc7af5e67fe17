"""A headless chromium that is told what to do by its DevTools protocol, over two pipes: messages in JSON, each ended by a zero byte."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MIDDLE = """element => {
    element.scrollIntoView({block: "center"});
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
}"""


class Browser:
    """`errors`: what pages logged as an error or threw, and addresses they asked for outside of themselves."""

    def __init__(self, commands: Any, replies: Any):
        self.commands, self.replies = commands, replies
        self.number = 0
        self.session: str | None = None
        self.errors: list[str] = []
        self.loaded = False

    def open(self, url: str, width: int = 1400, height: int = 1000) -> None:
        """Opens a page in a tab of its own and waits until it is loaded."""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.errors, self.loaded = [], False
        self._send("Page.navigate", url=url)
        while not self.loaded:
            self._note(self._receive())

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of an element, as a person would: something on top of it would get the click."""
        x, y = self.run(f"({MIDDLE})(document.querySelector({json.dumps(selector)}))")
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """Types into an element, after what it holds."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self._send("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """A key, such as Enter, for the element that has the focus."""
        text = {"Enter": "\r"}.get(key, "")
        code = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            parameters = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
            self._send("Input.dispatchKeyEvent", type=kind, **parameters, **({"text": text} if text and kind == "keyDown" else {}))

    def choose(self, selector: str, *files: Path) -> None:
        """Gives files to an input for files."""
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        node = self._send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def until(self, expression: str, seconds: float = 20) -> Any:
        """Waits until an expression in the page is true; its value then."""
        end = time.monotonic() + seconds
        while not (found := self.run(expression)):
            assert time.monotonic() < end, f"not within {seconds} seconds: {expression}"
            time.sleep(0.03)
        return found

    def screenshot(self, file: Path) -> None:
        """Of all of the page."""
        shot = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None and not method.startswith("Target."):
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            reply = self._receive()
            if reply.get("id") == self.number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self._note(reply)

    def _receive(self) -> dict[str, Any]:
        text = bytearray()
        while (letter := self.replies.read(1)) != b"\0":
            assert letter, "chromium has ended"
            text += letter
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        method, found = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(found["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and found["type"] == "error":
            self.errors.append(str([argument.get("description", argument.get("value")) for argument in found["args"]]))
        elif method == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.errors.append(found["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not found["request"]["url"].startswith(("data:", "file:", "blob:")):
            self.errors.append(f"asked for {found['request']['url']}")


@contextlib.contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Skips the test where there is no chromium. `folder`: for its profile."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs chromium")
    to_read, commands = os.pipe()
    replies, to_write = os.pipe()

    def connect() -> None:
        """chromium reads from 3 and writes to 4. The copies come first: the pipes may have these very numbers."""
        copies = os.dup(to_read), os.dup(to_write)
        os.dup2(copies[0], 3)
        os.dup2(copies[1], 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"]
    process = subprocess.Popen(
        [program, *options, "--remote-debugging-pipe"],
        preexec_fn=connect,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        with open(commands, "wb") as sending, open(replies, "rb") as receiving:
            yield Browser(sending, receiving)
    finally:
        process.terminate()
        process.wait(timeout=20)
