"""The search for the worst wording, against losses that are known."""

import re

import pytest

from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.stress.perturb import STRENGTHS, Perturbation
from moe_llava.evaluation.stress.words import attack_words

TEXT = "Which image shows the small yellow triangle near them?"  # nine words, all of three letters or more
WEIGHTS = dict(zip(re.findall("[A-Za-z]+", TEXT), (3.0, 9.0, 1.0, 2.0, 8.0, 4.0, 5.0, 7.0, 6.0), strict=True))
OPTIONS = "\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."


def losses(questions):
    """The loss is the sum of the weights of the words that are no longer there."""
    return [sum(weight for word, weight in WEIGHTS.items() if word not in question.prompt) for question in questions]


def changed(strength, prompt, measure=losses, seed=0):
    return attack_words(Question("7", prompt), Perturbation("words", strength, seed), measure).prompt


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_most_important_words_within_the_budget(strength):
    number = -(-strength * len(WEIGHTS) // 10)
    expected = sorted(WEIGHTS, key=WEIGHTS.get, reverse=True)[:number]
    found = changed(strength, TEXT + OPTIONS)
    assert [word for word in WEIGHTS if word not in found] == [word for word in WEIGHTS if word in expected]
    assert found.endswith(OPTIONS)
    assert len(found.split()) - len(OPTIONS.split()) in (9, 10)  # "near" may become "close to"
    assert found == changed(strength, TEXT + OPTIONS)  # deterministic


def test_the_worst_candidate_is_taken():
    """A synonym where it hurts most, a misspelling where that does."""
    assert "picture" in changed(1, TEXT, lambda questions: [float("picture" in question.prompt) for question in questions])
    doubled = re.compile(r"([a-z])\1")
    found = changed(5, "Which one?", lambda questions: [float(bool(doubled.search(question.prompt))) for question in questions])
    assert doubled.search(found)


def test_nothing_is_changed_that_does_not_hurt():
    asked = []

    def constant(questions):
        asked.extend(questions)
        return [1.0] * len(questions)

    assert changed(5, TEXT, constant) == TEXT
    assert len(asked) < 1 + 9 + 9 * 7
    assert changed(5, "7 ?") == "7 ?"
    assert changed(5, "<image>\nA. one\nB. two") == "<image>\nA. one\nB. two"
