"""The interface of the engine, for HTTP and the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_llava.serving.engine.requests import Piece, Prompt, Request

Result = TypeVar("Result")
Work = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Result]
# Called from the engine's thread with a result, or with the error that replaces it. It must neither block nor raise.
Deliver = Callable[[Result | Exception], object]


class Generation(Protocol):
    """A request or a job that was submitted."""

    def cancel(self) -> None:
        """Free its slot. One more piece may be delivered, and a job that has begun is not stopped."""


class Running(Generation, Protocol):
    """A completion. `reused`: the number of its prompt's first tokens that were not computed, because an earlier prompt began with the same
    tokens and images; it is known with the first piece."""

    reused: int


class CompletionEngine(Protocol):
    """Complete up to `slots` prompts at once, while up to `max_waiting` more wait. Each request has `time_limit` seconds, including the
    time it waits."""

    model: PreTrainedModel
    slots: int
    max_waiting: int
    time_limit: float

    @property
    def running(self) -> int:
        """The number of completions being generated."""

    @property
    def waiting(self) -> int:
        """The number of requests and jobs in the queue."""

    def submit(self, request: Request, deliver: Deliver[Piece]) -> Running:
        """Queue a request. `deliver` gets each piece of the completion, or the error that ended it.

        Raises RequestError if the model cannot answer it, QueueFull if the queue is full, EngineClosed after `close`.
        """

    def submit_work(self, work: Work[Result], deliver: Deliver[Result]) -> Generation:
        """Queue a job: `work` is called in the engine's thread with the model and its tokenizer. `deliver` gets its result, or the error
        that ended it. A job waits and counts like a request.

        Raises QueueFull if the queue is full, EngineClosed after `close`.
        """

    def check_queue(self) -> None:
        """Raise QueueFull or EngineClosed as `submit` would, before a request is prepared."""

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise RequestError if the model cannot be run on a prompt."""

    def clip_length(self, prompt_tokens: int, limit: int) -> int:
        """Return how many tokens the completion of a prompt of this length may have, up to `limit`; 1 if none, which `submit` refuses."""

    def close(self) -> None:
        """Accept no more requests, and return when all accepted ones are complete."""
