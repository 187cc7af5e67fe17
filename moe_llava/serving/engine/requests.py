"""Requests to the engine, the pieces that it delivers, and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


DEFAULT_MAX_NEW_TOKENS = 512  # tokens of a completion, if the request sets no limit
MAX_TEMPERATURE = 2.0  # as in OpenAI's API


class RequestError(ValueError):
    """The model cannot answer this request; the message names the value and the rule."""


class ContextError(RequestError):
    """Prompt and answer have more tokens than the model's context."""


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise RequestError if a value is out of bounds. Logits divided by less than 0.001 would overflow."""
    if not (temperature == 0 or 0.001 <= temperature <= MAX_TEMPERATURE) or not 0 < top_p <= 1:
        rule = f"temperature must be 0 or at least 0.001, and at most {MAX_TEMPERATURE:g}, and top_p above 0 and at most 1"
        raise RequestError(f"{rule}, but they are {temperature:g} and {top_p:g}")


class QueueFull(RuntimeError):
    """The queue of waiting requests is full."""


class TimeLimitExceeded(RuntimeError):
    """A completion was not finished in time."""


class EngineClosed(RuntimeError):
    """The engine accepts no more requests."""


@dataclass(frozen=True)
class Prompt:
    """The model's inputs. `input_ids`: token ids, including the placeholders of images. `inputs`: the others: token types [1, S], if the
    model has them, and the inputs of the images. `digest`: of these, if it is known (`media_digest`)."""

    input_ids: list[int]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    digest: bytes | None = None

    @property
    def nbytes(self) -> int:
        """The memory of `inputs`."""
        return sum(tensor.nbytes for tensor in self.inputs.values())


@dataclass(frozen=True)
class Request:
    """A prompt, and the options of its completion.

    temperature: 0 is greedy decoding.
    seed: None samples another completion each time.
    stop: strings that end the completion.
    top_logprobs: the number of most likely tokens to report at each position; None reports no probabilities.
    """

    prompt: Prompt
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at temperature 1. `top`: those of the most likely tokens, in order."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Piece:
    """The text of one token of a completion. `text` may be empty, because a character or a stop string may consist of several tokens.
    `finish_reason`: "stop" or "length" in the last piece, else None. The token that ends a completion has no `logprobs`."""

    token: int
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
