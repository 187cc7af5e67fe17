"""A language model as a judge, behind any endpoint for OpenAI's chat completions: a hosted one, or vLLM, llama.cpp, Ollama.

Every reply is saved as soon as it arrives, so no judgement is paid for twice. Scores compare only within one judge and one wording of its
prompt.
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
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from moe_llava.common.files import drop_torn_line

# A name of its own, so that the key of one provider is never sent to another.
KEY_VARIABLE = "MOE_LLAVA_JUDGE_KEY"
AT_ONCE = 4  # requests
ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds, doubled after each attempt
LONGEST_WAIT = 60.0
TIMEOUT = 120.0  # seconds
# The parameters of every request, until the endpoint rejects one: see `Judge._adapt`.
PARAMETERS = {"temperature": 0, "max_tokens": 1024}
MAX_COMPLETION_TOKENS = 8192  # for models that think before they reply, and count their thoughts
# All that is sent beside the key. The client would add keys and headers from variables such as OPENAI_CUSTOM_HEADERS.
HEADERS = ("host", "user-agent", "accept", "accept-encoding", "connection", "content-length", "content-type")
# Errors that another attempt would meet again.
FINAL = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)

Messages = list[dict[str, str]]
Parameters = dict[str, int]
Read = TypeVar("Read")


class JudgeError(ValueError):
    """A judge is unreachable or refuses a request, or its saved replies are damaged. The message says which and why."""


class Judge:
    """Query `model` at `endpoint`, the base URL up to and with /v1. `kept` holds the replies: JSON lines of key, messages, reply, usage.
    The API key is read from the environment; if there is none, none is sent.

    Raises JudgeError for a URL that cannot be a base URL, for unreadable saved replies, and if the package openai is missing.
    """

    def __init__(self, endpoint: str, model: str, kept: Path) -> None:
        self.url, self.model, self.kept = _base_url(endpoint), model, kept
        self._secret = _secret()
        self._replies = _read_kept(kept)
        self._used: set[str] = set()
        self._parameters: Parameters = PARAMETERS
        self._requests = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._client = _client(self.url, self._secret)

    def opinions(self, prompts: Sequence[str | None], system: str, read: Callable[[str], Read | None], reminder: str) -> list[Read | None]:
        """Return what `read` makes of the reply to each prompt, after the message `system`, as `query` does; None without a prompt."""
        conversations = [[{"role": "system", "content": system}, {"role": "user", "content": prompt}] for prompt in prompts if prompt]
        found = iter(self.query(conversations, read, reminder))
        return [next(found) if prompt else None for prompt in prompts]

    def query(self, conversations: Sequence[Messages], read: Callable[[str], Read | None], reminder: str) -> list[Read | None]:
        """Return what `read` makes of the reply to each conversation. If that is None, the judge is queried once more with the `reminder`;
        the value stays None if that does not help."""
        values = [read(reply) for reply in self._all_replies(conversations)]
        unread = [number for number, value in enumerate(values) if value is None]
        reminded = [
            [*messages, {**last, "content": f"{last['content']}\n\n{reminder}"}]
            for *messages, last in (conversations[number] for number in unread)
        ]
        for number, reply in zip(unread, self._all_replies(reminded), strict=True):
            values[number] = read(reply)
        return values

    def summary(self, prices: tuple[float, float] | None = None) -> dict[str, Any]:
        """Return the judge's model, its tokens, and each set of parameters that was sent. `prices`: of a million prompt tokens, and of a
        million reply tokens. Tokens and cost are those of all replies used, saved ones included; `asked` counts this run's requests."""
        used = [self._replies[key] for key in self._used]
        tokens = {name: sum(reply["usage"].get(name) or 0 for reply in used) for name in ("prompt_tokens", "completion_tokens")}
        found: dict[str, Any] = {
            "model": self.model,
            "served": sorted({reply["served"] for reply in used if reply["served"]}),
            "replies": len(used),
            "asked": self._requests,
            "parameters": [json.loads(text) for text in sorted({json.dumps(reply["parameters"], sort_keys=True) for reply in used})],
            **tokens,
            "replies_without_usage": sum(not reply["usage"] for reply in used),
        }
        if prices is not None:
            found["cost"] = (tokens["prompt_tokens"] * prices[0] + tokens["completion_tokens"] * prices[1]) / 1e6
        return found

    def _all_replies(self, conversations: Sequence[Messages]) -> list[str]:
        """Return the text of each reply. Replies that are not saved are requested, a few at once."""
        from rich.console import Console
        from rich.progress import Progress

        texts = [json.dumps([self.model, messages], sort_keys=True) for messages in conversations]
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        self._used.update(keys)
        waiting = {key: messages for key, messages in zip(keys, conversations, strict=True) if key not in self._replies}
        progress = Progress(console=Console(stderr=True), disable=not (waiting and sys.stderr.isatty()))
        with progress, ThreadPoolExecutor(AT_ONCE) as pool:
            bar = progress.add_task(f"querying {self.model}", total=len(waiting))
            requested = [pool.submit(self._request_and_save, key, messages) for key, messages in waiting.items()]
            try:
                for done in as_completed(requested):
                    done.result()
                    progress.advance(bar)
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        # Some servers leave the model's thoughts in front of the reply.
        return [re.sub(r"^\s*<think>.*?</think>", "", self._replies[key]["reply"], flags=re.DOTALL).strip() for key in keys]

    def _request_and_save(self, key: str, messages: Messages) -> None:
        reply = self._request(messages)
        line = json.dumps({"key": key, "model": self.model, "messages": messages, **reply})
        with self._lock:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with self.kept.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._replies[key] = reply
            self._requests += 1

    def _request(self, messages: Messages) -> dict[str, Any]:
        """Return `reply`, `served` (the endpoint's name for the model), `usage` and the `parameters` sent. Tries again where that may help.
        Parameters that the endpoint rejects are left out or renamed, for all later requests too."""
        from openai import APIConnectionError, APIStatusError

        # UTF-8 has no lone surrogates.
        sent = [{key: text.encode(errors="replace").decode() for key, text in message.items()} for message in messages]
        attempt, wait, trouble = 0, FIRST_WAIT, ""
        # Wait before all attempts but the first; end early if another request failed for good.
        while attempt < ATTEMPTS and not (attempt and self._stopped.wait(min(wait, LONGEST_WAIT))):
            wait = FIRST_WAIT * 2**attempt
            attempt += 1
            parameters = self._parameters
            try:
                completion = self._client.chat.completions.create(model=self.model, messages=sent, **parameters)
                return _read_completion(completion) | {"parameters": parameters}
            except APIStatusError as error:
                code, reason = error.status_code, self._reason(error.response.text)
                if code in (400, 422) and self._adapt(parameters, reason):
                    attempt = 0
                    continue
                hint = f" (the key is read from the environment variable {KEY_VARIABLE})" if code in (401, 403) else ""
                trouble = f"{self.url} says {code} {error.response.reason_phrase}{hint}: {reason[:300]}"
                if code not in (408, 429) and code < 500:
                    raise JudgeError(trouble) from error
                after = error.response.headers.get("Retry-After", "")
                wait = max(wait, float(after)) if after.isdecimal() else wait
            except (APIConnectionError, JudgeError) as error:
                cause = error if isinstance(error, JudgeError) else _first_cause(error)
                trouble = f"{self.url} gives no answer: {cause if str(cause) else type(cause).__name__}"
                if isinstance(cause, FINAL):
                    raise JudgeError(trouble) from error
        raise JudgeError(f"{trouble}; gave up after {attempt} attempts. Judgements so far are saved in {self.kept}: run it again")

    def _adapt(self, parameters: Parameters, refusal: str) -> bool:
        """Leave out or rename the parameters that a refusal names: some models want their own temperature, and `max_completion_tokens`
        instead of `max_tokens`. Return whether they now differ from those that were sent."""
        # Servers name max_tokens, too, if a prompt leaves no room for the reply.
        room = re.search("too large|context length|at most", refusal)
        with self._lock:  # other refused requests may have changed some
            left = {name: value for name, value in self._parameters.items() if name != "temperature" or name not in refusal}
            if "max_tokens" in refusal and not room and left.pop("max_tokens", None) is not None:
                left["max_completion_tokens"] = MAX_COMPLETION_TOKENS
            self._parameters = left
            return left != parameters

    def _reason(self, text: str) -> str:
        """Return the start of a server's answer in one line, without the key, which some servers repeat."""
        text = " ".join(text[:2000].split())
        return text.replace(self._secret, "***") if self._secret else text


def _client(url: str, secret: str) -> Any:
    try:
        import openai
    except ImportError as error:
        raise JudgeError("a judge needs openai, which is not installed: pip install -e '.[judge]'") from error

    def send_only_our_key(request: Any) -> None:
        for name in request.headers.keys() - set(HEADERS):
            del request.headers[name]
        if secret:
            request.headers["Authorization"] = f"Bearer {secret}"

    # A redirect would take the key elsewhere.
    try:
        http = openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"request": [send_only_our_key]})
    except (ImportError, ValueError) as error:
        raise JudgeError(f"the proxy that the environment names, such as in ALL_PROXY, cannot be used: {error}") from error
    return openai.OpenAI(api_key=secret or "none", base_url=url, timeout=TIMEOUT, max_retries=0, http_client=http)


def _first_cause(error: BaseException) -> BaseException:
    """Return the operating system's error behind an error of the client, or else the innermost one."""
    while not isinstance(error, FINAL) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _base_url(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    # Errors print it, so it holds no password; a path cannot follow a query.
    if not good or parts.query or parts.fragment or "@" in parts.netloc or not endpoint.isascii() or re.search(r"\s", endpoint):
        raise JudgeError("--endpoint must be a base URL such as http://localhost:8000/v1, without user, query or blanks")
    return endpoint.rstrip("/").removesuffix("/chat/completions")


def _secret() -> str:
    secret = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch(r"[!-~]*", secret):
        raise JudgeError(f"the environment variable {KEY_VARIABLE} has blanks or characters beyond ASCII, which no key has")
    return secret


def _read_kept(file: Path) -> dict[str, dict[str, Any]]:
    """Return key -> reply. Removes a last line that was cut off when a run was killed."""
    if not file.exists():
        return {}
    drop_torn_line(file)
    replies = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            reply = {"reply": str(record["reply"]), "served": record["served"], "usage": dict(record["usage"])}
            # Earlier versions, which did not save the parameters, sent these.
            replies[str(record["key"])] = reply | {"parameters": dict(record.get("parameters", PARAMETERS))}
        except (ValueError, KeyError, TypeError) as error:
            raise JudgeError(f"line {number} of {file} is no saved reply of a judge; remove the line to query again") from error
    return replies


def _read_completion(completion: Any) -> dict[str, Any]:
    """Raises JudgeError if it is no chat completion, for example if a proxy answers in the server's place."""
    try:
        text, usage = completion.choices[0].message.content, completion.usage
        counts = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
        counts = {name: int(count) for name, count in counts.items() if count is not None}
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise JudgeError(f"its answer is no chat completion, but {str(completion)[:100]!r}") from error
    # If a judge declines to reply, its reply is empty, and the reader rejects it.
    return {"reply": str(text or ""), "served": str(completion.model or ""), "usage": counts}
