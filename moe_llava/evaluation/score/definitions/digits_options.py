"""The digits world with four options a question, as MMMU has them (arXiv 2311.16502). The model writes one of the options: nothing is read
from letters, and a guess is right in a quarter of the cases.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError

OPTIONS = 4
LEFT_OUT = ("existence", "comparison", "caption")  # yes or no; one of two colours; sentences


def questions(folder: Path) -> list[Question]:
    """Return the questions of all families but LEFT_OUT, each with its answer and three answers to others of its family, which depend on
    its id only. Raise BenchmarkError if a family has fewer answers."""
    asked = [question for question in digits_world.questions(folder) if question.extra["family"] not in LEFT_OUT]
    answers: dict[str, set[str]] = {}
    for question in asked:
        answers.setdefault(question.extra["family"], set()).add(question.extra["answer"])
    for family, found in answers.items():
        if len(found) < OPTIONS:
            raise BenchmarkError(
                f"{folder / digits_world.QUESTIONS} has {len(found)} different answers to questions of the family {family}, but options "
                f"need {OPTIONS}: write more test pictures"
            )
    return [replace(question, options=_draw(question, answers[question.extra["family"]])) for question in asked]


def _draw(question: Question, answers: set[str]) -> tuple[str, ...]:
    right = question.extra["answer"]
    wrong = random.Random(question.id).sample(sorted(answers - {right}), OPTIONS - 1)
    return tuple(sorted([right, *wrong]))


BENCHMARK = replace(
    digits_world.BENCHMARK, name="digits-options", title="The digits world with four options a question", questions=questions
)
