"""Convert the pieces of a completion to the objects of OpenAI's API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse

from moe_llava.serving.engine.requests import Piece, TokenLogprobs
from moe_llava.serving.engine.text import REPLACEMENT
from moe_llava.serving.http.protocol import ApiError


class Reply:
    """One reply: a stream of chunks, the last one with the usage if `with_usage`, or a whole."""

    def __init__(self, model: str, prompt_tokens: int, stream: bool, with_usage: bool, with_logprobs: bool):
        self.stream, self.with_usage = stream, with_usage
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self._with_logprobs = with_logprobs

    def whole(self, pieces: Sequence[Piece], reused: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(pieces), "finish_reason": pieces[-1].finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage(len(pieces), reused)}

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk({"content": piece.text}, self._logprobs([piece]), piece.finish_reason)

    def usage_chunk(self, completion_tokens: int, reused: int) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(completion_tokens, reused)}

    def _chunk(self, delta: dict[str, str], logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _usage(self, completion_tokens: int, reused: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": [_token(piece.logprobs) for piece in pieces if piece.logprobs is not None], "refusal": None}


def error_response(error: ApiError) -> JSONResponse:
    """Return the response for an error."""
    return JSONResponse(error.body(), error.status, error.headers)


def _token(logprobs: TokenLogprobs) -> dict[str, Any]:
    return _entry(logprobs.text, logprobs.logprob) | {"top_logprobs": [_entry(text, logprob) for text, logprob in logprobs.top]}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """Return the log probability of a token. `bytes` are unknown for a token that is a part of a character."""
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}
