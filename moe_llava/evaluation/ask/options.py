"""Answers that are one of a question's options: at every token the likeliest with which an option goes on.

Nothing has to be read from such an answer, and a guess is right once in as many times as there are options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moe_llava.evaluation.ask.prompts import prompt_text
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.model.greedy import Allowed, end_tokens

# Indices of the questions of a batch, and the length of its padded prompts -> what its answers may be; None: anything.
Restrict = Callable[[Sequence[int], int], Allowed | None]


def restrict(model: Any, processor: Any, questions: Sequence[Question], texts: Sequence[str]) -> Restrict:
    """Return what restricts the answers to the questions' options. `texts`: the rendered prompts.

    Raise BenchmarkError if only some questions have options, or as `option_ids` does.
    """
    without = [question.id for question in questions if not question.options]
    if len(without) == len(questions):
        return lambda indices, start: None
    if without:
        raise BenchmarkError(f"question {without[0]} has no options, but others have: give all questions options, or none")
    ends = end_tokens(model)
    options = [option_ids(processor, question, text, ends) for question, text in zip(questions, texts, strict=True)]
    return lambda indices, start: _only([options[index] for index in indices], start)


def option_ids(processor: Any, question: Question, text: str, ends: Sequence[int]) -> list[list[int]]:
    """Return the token ids of each option as the answer to the rendered prompt `text`, up to the first of `ends`.

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
        length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        found.append(ids[:length])
    if len({tuple(ids) for ids in found}) < len(found):
        raise BenchmarkError(f"question {question.id} has options that are the same tokens to this model: {', '.join(question.options)}")
    return found


def _ids(processor: Any, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def _only(options: Sequence[Sequence[list[int]]], start: int) -> Allowed:
    """Return what allows each row one of its options behind `start` tokens."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        written = ids[start:].tolist()
        length = len(written)
        # An ended row is padded, whatever is allowed; but something must be.
        return sorted({each[length] for each in options[row] if each[:length] == written and len(each) > length}) or [int(ids[-1])]

    return allowed
