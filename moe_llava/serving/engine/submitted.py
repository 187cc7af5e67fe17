"""What was submitted to the engine: completions and other work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_llava.serving.engine.interface import Deliver, Work
from moe_llava.serving.engine.prefixes import Block
from moe_llava.serving.engine.requests import Request
from moe_llava.serving.engine.sampling import Sampler
from moe_llava.serving.engine.text import Detokenizer


@dataclass(eq=False)
class Pending:
    """A result that a caller waits for."""

    deliver: Deliver[Any]
    deadline: float
    done: bool = field(default=False, init=False)  # complete, failed, or cancelled from another thread

    def cancel(self) -> None:
        self.done = True

    def fail(self, error: Exception) -> None:
        self.done = True
        self.deliver(error)


@dataclass(eq=False)
class Row(Pending):
    """A running completion. `blocks`: of its prompt, of which the first `reused` tokens are not computed. `cached`: the number of its
    tokens in the cache, all but the last. `position`: of its next token."""

    request: Request
    text: Detokenizer
    sampler: Sampler | None
    blocks: list[Block]
    tokens: list[int] = field(default_factory=list)
    reused: int = 0
    cached: int = 0
    position: int = 0

    @property
    def rest(self) -> list[int]:
        """The tokens of the prompt that are computed."""
        return self.request.prompt.input_ids[self.reused :]


@dataclass(eq=False)
class Job(Pending):
    """Other work with the model, run between two decoding steps."""

    work: Work[Any]
