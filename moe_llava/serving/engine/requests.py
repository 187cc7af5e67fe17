"""What is asked of the engine, what it hands back, and why it may refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


LONGEST = 512  # tokens of an answer, where nothing is said
MOST_TEMPERATURE = 2.0  # as with OpenAI


class RequestError(ValueError):
    """A request that this model cannot answer; the message names the value and the rule."""


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises RequestError. Logits divided by less than 0.001 would be no numbers any more."""
    if not (temperature == 0 or 0.001 <= temperature <= MOST_TEMPERATURE) or not 0 < top_p <= 1:
        rule = f"temperature must be 0 or at least 0.001, and at most {MOST_TEMPERATURE:g}, and top_p above 0 and at most 1"
        raise RequestError(f"{rule}, but they are {temperature:g} and {top_p:g}")


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class TimeLimitExceeded(RuntimeError):
    """An answer was not complete in time."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """`input_ids`: as the processor makes them, placeholders of images and all. `pixel_values`: [images, channels, height, width].
    `temperature` 0: the likeliest token, always. `seed`: None for another answer each time. `stop`: strings that end the answer.
    `top_logprobs`: how many of the likeliest tokens to tell with each; None for no probabilities at all."""

    input_ids: list[int]
    max_new_tokens: int
    pixel_values: Tensor | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at temperature 1; `top`: of the likeliest tokens, in order."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer. `text` may be empty: a character or a stop string may come in parts. `finish_reason`: "stop" or
    "length" with the last piece, else None. The token that ends an answer has no `logprobs`."""

    token: int
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
