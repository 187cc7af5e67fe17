"""The subset of OpenAI's chat completions that this server supports. All other options are refused by name, not ignored.

Unusual here: the body is parsed by pydantic's JSON parser, which bounds nesting and accepts no lone surrogates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from moe_llava.serving.engine.requests import DEFAULT_MAX_NEW_TOKENS, MAX_TEMPERATURE
from moe_llava.serving.http.fields import (
    FieldError,
    Read,
    boolean,
    by_kind,
    integer,
    items,
    mapping,
    number,
    one_of,
    only,
    read_object,
    string,
)

MAX_STOPS = 4
MAX_INTEGER = 2**31 - 1
MAX_MESSAGE = 500  # characters of a message, which may quote what a client sent
RETRY_AFTER = 2  # seconds
CLIENT_CLOSED = 499  # nginx's status for a client that disconnected


class ApiError(Exception):
    """An error for the client, in OpenAI's format. `status`: the HTTP status."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message[:MAX_MESSAGE])
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        types = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        type_ = types.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": type_, "param": self.param, "code": self.code}}


class MessagesError(ApiError):
    """The messages of a request are not accepted. `part`: the path of the value, such as `messages.0.content.1.image_url`."""

    def __init__(self, message: str, part: str = "messages"):
        super().__init__(400, message, part)


def busy(status: int, message: str, code: str) -> ApiError:
    """Return an error after which the client may try again."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(RETRY_AFTER)})


@dataclass(frozen=True)
class Limits:
    """The limits of one request, except for `all_bytes`."""

    body_bytes: int = 32 * 2**20  # includes images and videos in base64
    all_bytes: int = 384 * 2**20  # of all requests together: bodies, fetched images, and the images' inputs
    working_bytes: int = 1000 * 10**6  # to decode and resize one image or video
    delimiters: int = 250_000  # commas, colons and opening brackets, which bound the number of parsed values
    image_bytes: int = 8 * 2**20  # of one encoded image or video
    pixels: int = 25_000_000  # of one decoded image, or of a frame
    all_pixels: int = 50_000_000  # of all images of a request, and of the frames that the model sees
    scans: int = 100  # of a JPEG; decoding one takes as long as decoding a whole image
    images: int = 8
    videos: int = 1
    decoded_pixels: int = 4_000_000_000  # of all frames of a video: one minute at 1920 x 1080 and 30 frames a second
    messages: int = 128
    characters: int = 200_000  # of all texts
    new_tokens: int = DEFAULT_MAX_NEW_TOKENS  # of a completion, if the request sets no limit
    head_seconds: float = 10.0  # to receive the head of a request
    body_seconds: float = 60.0  # to receive its body
    fetch_seconds: float = 20.0  # to fetch its images from other servers


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    url: str


@dataclass(frozen=True)
class VideoPart:
    url: str


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: list[TextPart | ImagePart | VideoPart]


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

    def max_length(self) -> int | None:
        """Return the requested maximum length of the completion, in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _text_part(value: Any, path: str) -> TextPart:
    return TextPart(read_object(value, path, {"type": string, "text": string}, ("text",), {})["text"])


def _image_part(value: Any, path: str) -> ImagePart:
    return ImagePart(read_object(value, path, {"type": string, "image_url": _image_url}, ("image_url",), {})["image_url"])


def _image_url(value: Any, path: str) -> str:
    # `detail` has no effect: the processor decides on the number of tokens.
    return read_object(value, path, {"url": string}, ("url",), {"detail": one_of("auto", "low", "high")})["url"]


def _video_part(value: Any, path: str) -> VideoPart:
    return VideoPart(read_object(value, path, {"type": string, "video_url": _video_url}, ("video_url",), {})["video_url"])


def _video_url(value: Any, path: str) -> str:
    return read_object(value, path, {"url": string}, ("url",), {})["url"]


def _content(parts: Mapping[str, Read[Any]]) -> Read[list[Any]]:
    read_list = items(by_kind("type", parts), "a string or a list of parts")
    return lambda value, path: [TextPart(value)] if isinstance(value, str) else read_list(value, path)


def _message(content: Read[Any], dropped: Mapping[str, Read[None]]) -> Read[Message]:
    kept = {"role": string, "content": content}
    return lambda value, path: Message(**read_object(value, path, kept, ("content",), dropped))


def _stop(value: Any, path: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 1 <= len(stop) <= 200 for stop in stops):
        raise FieldError(path, f"must be up to {MAX_STOPS} strings of 1 to 200 characters")
    return tuple(stops)


def _stream_options(value: Any, path: str) -> StreamOptions:
    return StreamOptions(**read_object(value, path, {"include_usage": boolean}, (), {"include_obfuscation": only(False)}))


TEXTS = _content({"text": _text_part})
MESSAGE = by_kind(
    "role",
    {
        "system": _message(TEXTS, {}),
        "user": _message(_content({"text": _text_part, "image_url": _image_part, "video_url": _video_part}), {}),
        "assistant": _message(TEXTS, {"annotations": only([]), "tool_calls": only([])}),  # clients send back the messages that they got
    },
)
SUPPORTED: dict[str, Read[Any]] = {
    "model": string,
    "messages": items(MESSAGE, "a list of messages"),
    "max_tokens": integer(1, MAX_INTEGER),
    "max_completion_tokens": integer(1, MAX_INTEGER),
    "temperature": number(0, MAX_TEMPERATURE),
    "top_p": number(0, 1, above=True),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": _stop,
    "stream": boolean,
    "stream_options": _stream_options,
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
}
# OpenAI's fields that are accepted with these values only, and without effect. null is accepted in every field.
WITHOUT_EFFECT: dict[str, Read[Any]] = {
    "frequency_penalty": only(0),
    "function_call": only("none", "auto"),
    "functions": only([]),
    "logit_bias": only({}),
    "metadata": mapping,
    "modalities": only(["text"], []),
    "n": only(1),
    "parallel_tool_calls": only(False, True),
    "presence_penalty": only(0),
    "prompt_cache_key": string,
    "prompt_cache_options": only({}, {"mode": "implicit"}),
    "prompt_cache_retention": only("in_memory"),
    "reasoning_effort": only("none"),
    "response_format": only({"type": "text"}),
    "safety_identifier": string,
    "service_tier": only("auto", "default"),
    "store": only(False),
    "tool_choice": only("none", "auto"),
    "tools": only([]),
    "user": string,
    "verbosity": only("medium"),
}


def parse(body: bytes | bytearray, limits: Limits, with_answer: bool = False) -> ChatCompletionRequest:
    """Return the request in a body. `with_answer`: the last message must be an answer, not a question.

    Raises ApiError (400), which names the field and the rule.
    """
    # A value of two bytes takes about a hundred bytes when it is parsed.
    if sum(map(body.count, b",:[{")) > limits.delimiters:
        raise ApiError(400, f"the body has more than {limits.delimiters} commas, colons and opening brackets")
    try:
        content = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body: must be JSON: {error}") from error
    try:
        chat = ChatCompletionRequest(**read_object(content, "", SUPPORTED, ("model", "messages"), WITHOUT_EFFECT))
    except FieldError as error:
        raise ApiError(400, str(error), error.path[:100] or None) from error
    if chat.max_tokens is not None and chat.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens: give one of max_tokens and max_completion_tokens", "max_tokens")
    if chat.top_logprobs and not chat.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
    if chat.stream_options.include_usage and not chat.stream:
        raise ApiError(400, "stream_options.include_usage: needs stream to be true", "stream_options.include_usage")
    _check_messages(chat, limits, with_answer)
    return chat


def _check_messages(chat: ChatCompletionRequest, limits: Limits, with_answer: bool) -> None:
    if len(chat.messages) > limits.messages:
        raise MessagesError(f"{len(chat.messages)} messages, but at most {limits.messages} are allowed")
    roles = [message.role for message in chat.messages]
    turns = roles[1:] if roles[0] == "system" else roles
    in_order = all(role == ("user", "assistant")[number % 2] for number, role in enumerate(turns))
    if not turns or not in_order or (turns[-1] == "assistant") != with_answer:
        last = "assistant" if with_answer else "user"
        rule = f"after at most one system message, user and assistant must alternate, from user to {last}"
        raise MessagesError(f"messages: {rule}, but the roles are {', '.join(roles)}")
    parts = [part for message in chat.messages for part in message.content]
    for kind, name, most in ((ImagePart, "images", limits.images), (VideoPart, "videos", limits.videos)):
        number = sum(isinstance(part, kind) for part in parts)
        if number > most:
            raise MessagesError(f"{number} {name}, but at most {most} are allowed")
    characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    if characters > limits.characters:
        raise MessagesError(f"{characters} characters of text, but at most {limits.characters} are allowed")
    if not any(not isinstance(part, TextPart) or part.text.strip() for part in chat.messages[-1].content):
        path = f"messages.{len(chat.messages) - 1}.content"
        raise ApiError(400, f"{path}: the last message is empty", path)


def media_of(messages: list[Message]) -> list[tuple[ImagePart | VideoPart, str]]:
    """Return the images and videos in order, each with the path of its URL in the body, by which messages name it."""
    return [
        (part, f"messages.{number}.content.{index}.{'video' if isinstance(part, VideoPart) else 'image'}_url")
        for number, message in enumerate(messages)
        for index, part in enumerate(message.content)
        if not isinstance(part, TextPart)
    ]
