"""Answers that are one of a question's options: at every token the likeliest with which an option goes on.

Nothing has to be read from such an answer, and a guess is right once in as many times as there are options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_llava.evaluation.ask.prompts import prompt_text
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.model.greedy import Allowed, end_tokens

Written = list[list[int]]  # the token ids of each way to write one of a question's options


@dataclass(frozen=True)
class Restriction:
    """`options`: those of each question, in the order of the questions; empty if answers may be anything."""

    options: list[Written]

    @property
    def longest(self) -> int:
        """The tokens of the longest option; 0 if answers may be anything."""
        return max((len(ids) for options in self.options for ids in options), default=0)

    def allowed(self, indices: Sequence[int], start: int) -> Allowed | None:
        """Return what allows each row of a batch one of its question's options behind `start` tokens; None: anything. `indices`: those of
        the rows' questions."""
        if not self.options:
            return None
        options = [self.options[index] for index in indices]

        def allowed(row: int, ids: Tensor) -> list[int]:
            written = ids[start:].tolist()
            length = len(written)
            # An ended row is padded, whatever is allowed; but something must be.
            return sorted({each[length] for each in options[row] if each[:length] == written and len(each) > length}) or [int(ids[-1])]

        return allowed


def restrict(model: Any, processor: Any, questions: Sequence[Question], texts: Sequence[str]) -> Restriction:
    """Return what restricts the answers to the questions' options. `texts`: the rendered prompts.

    Raise BenchmarkError if only some questions have options, or as `write_options` does.
    """
    without = [question.id for question in questions if not question.options]
    if len(without) == len(questions):
        return Restriction([])
    if without:
        raise BenchmarkError(f"question {without[0]} has no options, but others have: give all questions options, or none")
    ends = end_tokens(model)
    return Restriction([write_options(processor, question, text, ends) for question, text in zip(questions, texts, strict=True)])


def write_options(processor: Any, question: Question, text: str, ends: Sequence[int]) -> Written:
    """Return the options as answers to the rendered prompt `text`, up to the first of `ends`. Where the chat template writes no end, each
    of `ends` may follow: without one, an option that begins another could not be chosen.

    Raise BenchmarkError if the chat template does not write an answer behind a prompt, if the tokenizer joins the two, or if it makes two
    options the same.
    """
    prompt, found = _ids(processor, text), []
    for option in question.options:
        answered = _ids(processor, prompt_text(processor, question, option))
        if answered[: len(prompt)] != prompt:
            raise BenchmarkError(
                f"question {question.id} has options, but with the answer {option!r} its prompt is other tokens: this model can only "
                "answer without options"
            )
        ids = answered[len(prompt) :]
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        found.append([ids[: end + 1]] if end is not None else [[*ids, token] for token in ends] or [ids])
    if len({tuple(ways[0]) for ways in found}) < len(found):
        raise BenchmarkError(f"question {question.id} has options that are the same tokens to this model: {', '.join(question.options)}")
    return [ids for ways in found for ids in ways]


def _ids(processor: Any, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]
