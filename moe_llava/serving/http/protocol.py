"""The subset of OpenAI's chat completions that this server supports. All other options are refused by name, not ignored.

Unusual here: the body is parsed by pydantic's JSON parser, which bounds nesting and accepts no lone surrogates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from moe_llava.serving.engine.requests import LONGEST, MOST_TEMPERATURE
from moe_llava.serving.http.fields import (
    FieldError,
    Read,
    boolean,
    by_kind,
    fields,
    items,
    label,
    labels,
    number,
    one_of,
    only,
    text,
    whole,
)

MOST_STOPS = 4
MOST_WHOLE = 2**31 - 1
MOST_TOLD = 500  # characters of a message: what a client sent comes back in part only
RETRY_AFTER = 2  # seconds
LEFT = 499  # the status that some servers log for a client that did not wait


class ApiError(Exception):
    """An error for the client, in OpenAI's format. `status`: of HTTP."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message[:MOST_TOLD])
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request may hold. `body_bytes` bounds images, too, which come in base64; `marks` are commas, colons and opening brackets,
    of which values are made; `pixels` is of one image, decoded; `scans` of a JPEG, each of which takes as long as the whole image;
    `characters` of all texts; `new_tokens` is the longest answer of who asks for none. `all_bytes`: of the bodies, fetched images and pixel
    values of all requests; `working_bytes`: of an image while it is decoded and resized. Seconds: for a request's head, its body, and its
    images from other servers."""

    body_bytes: int = 32 * 2**20
    all_bytes: int = 192 * 2**20
    working_bytes: int = 700 * 10**6
    marks: int = 250_000
    image_bytes: int = 8 * 2**20
    pixels: int = 25_000_000
    all_pixels: int = 50_000_000
    scans: int = 100
    images: int = 8
    messages: int = 128
    characters: int = 200_000
    new_tokens: int = LONGEST
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    fetch_seconds: float = 20.0


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    url: str


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str | list[TextPart | ImagePart]


@dataclass(frozen=True)
class StreamOptions:
    include_usage: bool = False


@dataclass(frozen=True)
class ChatCompletionRequest:
    model: str
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False
    top_logprobs: int = 0

    def longest(self) -> int | None:
        """Return the requested maximum length of the completion, in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _text_part(found: Any, place: str) -> TextPart:
    return TextPart(fields(found, place, {"type": text, "text": text}, ("text",), {})["text"])


def _image_part(found: Any, place: str) -> ImagePart:
    return ImagePart(fields(found, place, {"type": text, "image_url": _image_url}, ("image_url",), {})["image_url"])


def _image_url(found: Any, place: str) -> str:
    # `detail` has no effect: every image makes as many tokens.
    return fields(found, place, {"url": text}, ("url",), {"detail": one_of("auto", "low", "high")})["url"]


def _content(parts: Mapping[str, Read[Any]]) -> Read[Any]:
    read_list = items(by_kind("type", parts), "a text or a list of parts")
    return lambda found, place: found if isinstance(found, str) else read_list(found, place)


def _message(content: Read[Any], dropped: Mapping[str, Read[None]]) -> Read[Message]:
    kept = {"role": text, "content": content}
    return lambda found, place: Message(**fields(found, place, kept, ("content",), dropped))


def _stop(found: Any, place: str) -> tuple[str, ...]:
    stops = [found] if isinstance(found, str) else found
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(stop, str) and 1 <= len(stop) <= 200 for stop in stops):
        raise FieldError(place, f"takes up to {MOST_STOPS} strings of 1 to 200 characters")
    return tuple(stops)


def _stream_options(found: Any, place: str) -> StreamOptions:
    return StreamOptions(**fields(found, place, {"include_usage": boolean}, (), {"include_obfuscation": only(False)}))


TEXTS = _content({"text": _text_part})
MESSAGE = by_kind(
    "role",
    {
        "system": _message(TEXTS, {}),
        "user": _message(_content({"text": _text_part, "image_url": _image_part}), {}),
        "assistant": _message(TEXTS, {"annotations": only([]), "tool_calls": only([])}),  # clients send on what they got
    },
)
HONOURED: dict[str, Read[Any]] = {
    "model": text,
    "messages": items(MESSAGE, "a list of messages"),
    "max_tokens": whole(1, MOST_WHOLE),
    "max_completion_tokens": whole(1, MOST_WHOLE),
    "temperature": number(0, MOST_TEMPERATURE),
    "top_p": number(0, 1, above=True),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": _stop,
    "stream": boolean,
    "stream_options": _stream_options,
    "logprobs": boolean,
    "top_logprobs": whole(0, 20),
}
# OpenAI's fields that have no effect here, with the values that ask for nothing. null does so in every field.
WITHOUT_EFFECT: dict[str, Read[None]] = {
    "frequency_penalty": only(0),
    "function_call": only("none", "auto"),
    "functions": only([]),
    "logit_bias": only({}),
    "metadata": labels,
    "modalities": only(["text"], []),
    "n": only(1),
    "parallel_tool_calls": only(False, True),
    "presence_penalty": only(0),
    "prompt_cache_key": label,
    "prompt_cache_options": only({}, {"mode": "implicit"}),
    "prompt_cache_retention": only("in_memory"),
    "reasoning_effort": only("none"),
    "response_format": only({"type": "text"}),
    "safety_identifier": label,
    "service_tier": only("auto", "default"),
    "store": only(False),
    "tool_choice": only("none", "auto"),
    "tools": only([]),
    "user": label,
    "verbosity": only("medium"),
}


def parse(body: bytes | bytearray, limits: Limits, answered: bool = False) -> ChatCompletionRequest:
    """Return the request in a body. `answered`: the last message must be an answer, not a question.

    Raises ApiError (400), which names the field and the rule.
    """
    # A value of two bytes takes some hundred when it is parsed.
    if sum(map(body.count, b",:[{")) > limits.marks:
        raise ApiError(400, f"the body has more than {limits.marks} commas, colons and opening brackets")
    try:
        content = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body: must be JSON, but: {error}") from error
    try:
        asked = ChatCompletionRequest(**fields(content, "", HONOURED, ("model", "messages"), WITHOUT_EFFECT))
    except FieldError as error:
        raise ApiError(400, str(error), error.place[:100] or None) from error
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens: give one of max_tokens and max_completion_tokens", "max_tokens")
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
    if asked.stream_options.include_usage and not asked.stream:
        raise ApiError(400, "stream_options.include_usage: needs stream to be true", "stream_options.include_usage")
    _check_messages(asked, limits, answered)
    return asked


def _check_messages(asked: ChatCompletionRequest, limits: Limits, answered: bool) -> None:
    if len(asked.messages) > limits.messages:
        raise ApiError(400, f"{len(asked.messages)} messages, but at most {limits.messages} are taken", "messages")
    roles = [message.role for message in asked.messages]
    turns = roles[1:] if roles[0] == "system" else roles
    in_order = all(role == ("user", "assistant")[number % 2] for number, role in enumerate(turns))
    if not turns or not in_order or (turns[-1] == "assistant") != answered:
        last = "user has the first, assistant the last" if answered else "user has the first and the last"
        rule = f"after at most one system message, user and assistant take turns, and {last}"
        raise ApiError(400, f"messages: {rule}, but the roles are {', '.join(roles)}", "messages")
    parts = [part for message in asked.messages for part in parts_of(message.content)]
    images = sum(isinstance(part, ImagePart) for part in parts)
    if images > limits.images:
        raise ApiError(400, f"{images} images, but at most {limits.images} are taken", "messages")
    characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    if characters > limits.characters:
        raise ApiError(400, f"{characters} characters of text, but at most {limits.characters} are taken", "messages")
    if not any(isinstance(part, ImagePart) or part.text.strip() for part in parts_of(asked.messages[-1].content)):
        place = f"messages.{len(asked.messages) - 1}.content"
        raise ApiError(400, f"{place}: the last message is empty", place)


def parts_of(content: str | list[TextPart | ImagePart]) -> list[TextPart | ImagePart]:
    return [TextPart(content)] if isinstance(content, str) else content


def image_urls(messages: list[Message]) -> list[tuple[str, str]]:
    """Return the URL of each image in order, and its place in the body, by which messages name it."""
    return [
        (part.url, f"messages.{number}.content.{place}.image_url")
        for number, message in enumerate(messages)
        for place, part in enumerate(parts_of(message.content))
        if isinstance(part, ImagePart)
    ]
