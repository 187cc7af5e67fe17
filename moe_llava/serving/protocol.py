"""The part of OpenAI's chat completions that this server speaks. Whatever else a client asks for is refused by name, not passed over.

Unusual here: the body is parsed by pydantic's own parser, which bounds nesting and takes neither halves of characters nor NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_llava.serving.requests import LONGEST

MOST_STOPS = 4
MOST_TOLD = 500  # characters of a message: what a client sent comes back in part only
RETRY_AFTER = 2  # seconds
LEFT = 499  # the status that some servers log for a client that did not wait


class ApiError(Exception):
    """What a client is told, in OpenAI's form. `status`: of HTTP."""

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


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """`detail` has no effect: every image makes as many tokens."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(Strict):
    role: Literal["system"]
    content: str | list[TextPart]


class UserMessage(Strict):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class AssistantMessage(Strict):
    """`refusal` comes back from clients that send on what they got."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    refusal: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    include_usage: bool = False


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatCompletionRequest(Strict):
    """Fields with one value are those that clients send by default. `user` has no effect."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: int | None = Field(None, ge=1, le=1)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    response_format: ResponseFormat | None = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def longest(self) -> int | None:
        """The longest answer that is asked for, in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse(body: bytes | bytearray, limits: Limits, answered: bool = False) -> ChatCompletionRequest:
    """`answered`: whether the last message is to be an answer, and not a question. Raises ApiError (400), which names the field and the
    rule."""
    # A value of two bytes takes some hundred when it is parsed.
    if sum(map(body.count, b",:[{")) > limits.marks:
        raise ApiError(400, f"the body has more than {limits.marks} commas, colons and opening brackets")
    try:
        asked = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{place or 'the body'}: {first['msg']}", place[:100] or None) from error
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise ApiError(400, "give one of max_tokens and max_completion_tokens", "max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    if len(asked.stops()) > MOST_STOPS or not all(1 <= len(stop) <= 200 for stop in asked.stops()):
        raise ApiError(400, f"stop takes up to {MOST_STOPS} strings of 1 to 200 characters", "stop")
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
        raise ApiError(400, "the last message is empty", "messages")


def parts_of(content: str | list[Any]) -> list[TextPart | ImagePart]:
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


def image_urls(messages: list[Message]) -> list[str]:
    return [part.image_url.url for message in messages for part in parts_of(message.content) if isinstance(part, ImagePart)]
