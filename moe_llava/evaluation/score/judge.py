"""A language model as a judge, behind any endpoint that speaks OpenAI's chat completions: a hosted one, or vLLM, llama.cpp, Ollama.

Every reply is kept on disk as it comes, so what was judged once is never paid for again. Scores of judges compare only within one judge and
one wording of what it is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

# A name of its own: the key of one provider must not go to another because it happens to lie about.
KEY_VARIABLE = "MOE_LLAVA_JUDGE_KEY"
AT_ONCE = 4  # requests
ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds, doubled after each attempt
LONGEST_WAIT = 60.0
TIMEOUT = 120.0  # seconds
# What every request asks for, until the endpoint rejects it: see `_without`.
PARAMETERS = {"temperature": 0, "max_tokens": 1024}
MAX_COMPLETION_TOKENS = 8192  # where models think before they reply, and thoughts count
# What another attempt would not mend.
FINAL = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)

Messages = list[dict[str, str]]
Parameters = dict[str, int]
Read = TypeVar("Read")


class JudgeError(ValueError):
    """A judge cannot be reached, refuses, or its kept replies are damaged; the message says which and why."""


class _Rejected(JudgeError):
    """A request that is not accepted as it is (400, 422). `reason`: all that the server says of it."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class _StayHere(HTTPRedirectHandler):
    """A redirect would take the key elsewhere, so it is an error like any other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Judge:
    """Asks `model` at `endpoint`, the base URL up to and with /v1. `kept`: JSON lines of key, messages, reply, usage. The API key is in the
    environment; without one, none is sent.

    Raises JudgeError for a URL that cannot be a base URL, or kept replies that cannot be read.
    """

    def __init__(self, endpoint: str, model: str, kept: Path) -> None:
        self.url, self.model, self.kept = _completions_url(endpoint), model, kept
        self._secret = _secret()
        self._replies = _read_kept(kept)
        self._used: set[str] = set()
        self._parameters: Parameters = PARAMETERS
        self._asked = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._opener = build_opener(_StayHere)

    def ask(self, conversations: Sequence[Messages], read: Callable[[str], Read | None], reminder: str) -> list[Read | None]:
        """What `read` makes of the reply to each conversation. Where that is None, the judge is asked once more, with the `reminder`;
        None stays where that does not help."""
        values = [read(reply) for reply in self._all_replies(conversations)]
        unread = [number for number, value in enumerate(values) if value is None]
        reminded = [_with_reminder(conversations[number], reminder) for number in unread]
        for number, reply in zip(unread, self._all_replies(reminded), strict=True):
            values[number] = read(reply)
        return values

    def summary(self, prices: tuple[float, float] | None = None) -> dict[str, Any]:
        """Which model judged, what it took, and the parameters that were sent, each set of them once. `prices`: of a million prompt tokens,
        and of a million tokens of replies. Tokens and cost are those of all replies used, kept ones among them; `asked`: requests of this
        run."""
        used = [self._replies[key] for key in self._used]
        tokens = {name: sum(reply["usage"].get(name) or 0 for reply in used) for name in ("prompt_tokens", "completion_tokens")}
        found: dict[str, Any] = {
            "model": self.model,
            "served": sorted({reply["served"] for reply in used if reply["served"]}),
            "replies": len(used),
            "asked": self._asked,
            "parameters": [json.loads(text) for text in sorted({json.dumps(reply["parameters"], sort_keys=True) for reply in used})],
            **tokens,
            "replies_without_usage": sum(not reply["usage"] for reply in used),
        }
        if prices is not None:
            found["cost"] = (tokens["prompt_tokens"] * prices[0] + tokens["completion_tokens"] * prices[1]) / 1e6
        return found

    def _all_replies(self, conversations: Sequence[Messages]) -> list[str]:
        """The texts of the replies; those that are not kept are asked for, a few at once."""
        from rich.console import Console
        from rich.progress import Progress

        keys = [self._key(messages) for messages in conversations]
        self._used.update(keys)
        waiting = {key: messages for key, messages in zip(keys, conversations, strict=True) if key not in self._replies}
        progress = Progress(console=Console(stderr=True), disable=not (waiting and sys.stderr.isatty()))
        with progress, ThreadPoolExecutor(AT_ONCE) as pool:
            bar = progress.add_task(f"asking {self.model}", total=len(waiting))
            asked = [pool.submit(self._ask_and_keep, key, messages) for key, messages in waiting.items()]
            try:
                for done in as_completed(asked):
                    done.result()
                    progress.advance(bar)
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [_text(self._replies[key]["reply"]) for key in keys]

    def _key(self, messages: Messages) -> str:
        return hashlib.sha256(json.dumps([self.model, messages], sort_keys=True).encode()).hexdigest()

    def _ask_and_keep(self, key: str, messages: Messages) -> None:
        reply = self._request(messages)
        line = json.dumps({"key": key, "model": self.model, "messages": messages, **reply})
        with self._lock:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with self.kept.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._replies[key] = reply
            self._asked += 1

    def _request(self, messages: Messages) -> dict[str, Any]:
        """Return the reply as `_attempt` does, and the `parameters` that were sent. Parameters that the endpoint rejects are left out or
        renamed, for all requests to come."""
        while True:
            parameters = self._parameters
            try:
                return self._attempt(messages, parameters) | {"parameters": parameters}
            except _Rejected as error:
                with self._lock:  # others may have been rejected, too: what they changed stays
                    self._parameters = _without(self._parameters, error.reason)
                    if self._parameters == parameters:
                        raise

    def _attempt(self, messages: Messages, parameters: Parameters) -> dict[str, Any]:
        """`reply`, `served` (the name by which the endpoint calls the model), `usage`. Tries again when that may help."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._secret}"} if self._secret else {})
        body = {"model": self.model, "messages": messages, **parameters}
        request = Request(self.url, json.dumps(body).encode(), headers)
        wait, trouble = FIRST_WAIT, ""
        for attempt in range(ATTEMPTS):
            # Waits before all attempts but the first; ends early if another request met what cannot be mended.
            if attempt and self._stopped.wait(min(wait, LONGEST_WAIT)):
                break
            wait = FIRST_WAIT * 2**attempt
            try:
                with self._opener.open(request, timeout=TIMEOUT) as response:
                    return _read_completion(response.read())
            except HTTPError as error:
                reason = self._reason(error)
                hint = f" (the key is read from the environment variable {KEY_VARIABLE})" if error.code in (401, 403) else ""
                trouble = f"{self.url} says {error.code} {error.reason}{hint}: {reason[:300]}"
                if error.code in (400, 422):
                    raise _Rejected(trouble, reason) from error
                if error.code not in (408, 429) and error.code < 500:
                    raise JudgeError(trouble) from error
                after = error.headers.get("Retry-After", "")
                wait = max(wait, float(after)) if after.isdecimal() else wait
            except (OSError, HTTPException, JudgeError) as error:
                cause = error.reason if isinstance(error, URLError) else error
                trouble = f"{self.url} gives no answer: {cause or type(cause).__name__}"
                if isinstance(cause, FINAL):
                    raise JudgeError(trouble) from error
        raise JudgeError(f"{trouble}; gave up after {attempt + 1} attempts. What was judged is kept in {self.kept}: run it again")

    def _reason(self, error: HTTPError) -> str:
        """Return what the server says, in one line, without the key, which some servers repeat."""
        try:
            text = error.read(2000).decode(errors="replace")
        except (OSError, HTTPException):
            text = ""
        text = " ".join(text.split())
        return text.replace(self._secret, "***") if self._secret else text


def _without(parameters: Parameters, refusal: str) -> Parameters:
    """Return the parameters without those that a refusal names: some models want their own temperature, and `max_completion_tokens` instead
    of `max_tokens`."""
    left = dict(parameters)
    if "temperature" in refusal:
        left.pop("temperature", None)
    # A prompt that leaves no room for the reply is refused by that name, too.
    room = re.search("too large|context length|at most", refusal)
    if "max_tokens" in refusal and not room and left.pop("max_tokens", None) is not None:
        left["max_completion_tokens"] = MAX_COMPLETION_TOKENS
    return left


def _completions_url(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    # It is printed in errors, so it holds no password; a query could not be followed by a path.
    if not good or parts.query or parts.fragment or "@" in parts.netloc or not endpoint.isascii() or re.search(r"\s", endpoint):
        raise JudgeError("--endpoint must be a base URL such as http://localhost:8000/v1, without user, query or blanks")
    return endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def _secret() -> str:
    secret = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch(r"[!-~]*", secret):
        raise JudgeError(f"the environment variable {KEY_VARIABLE} holds what no key has: blanks, or signs beyond ASCII")
    return secret


def _read_kept(file: Path) -> dict[str, dict[str, Any]]:
    """Key -> reply. A last line that was cut off when a run was killed is taken away."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(file, len(whole))
    replies = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            reply = {"reply": str(record["reply"]), "served": record["served"], "usage": dict(record["usage"])}
            # Earlier versions, which noted none, sent these.
            replies[str(record["key"])] = reply | {"parameters": dict(record.get("parameters", PARAMETERS))}
        except (ValueError, KeyError, TypeError) as error:
            raise JudgeError(f"line {number} of {file} is no kept reply of a judge; remove the line to ask again") from error
    return replies


def _read_completion(body: bytes) -> dict[str, Any]:
    """Raises JudgeError if the body is no chat completion, as when a proxy answers in the server's place."""
    try:
        record = json.loads(body)
        text = record["choices"][0]["message"]["content"]
        usage = record.get("usage") or {}
        counts = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens") if usage.get(name) is not None}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise JudgeError(f"its answer is no chat completion, but {body[:100]!r}") from error
    # A judge that declines to say anything has said nothing: that is for the reader to find.
    return {"reply": str(text or ""), "served": str(record.get("model") or ""), "usage": counts}


def _text(reply: str) -> str:
    """Without the thoughts that some servers leave in front of it."""
    return re.sub(r"^\s*<think>.*?</think>", "", reply, flags=re.DOTALL).strip()


def _with_reminder(messages: Messages, reminder: str) -> Messages:
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{reminder}"}]
