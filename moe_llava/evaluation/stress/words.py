"""An adversarial question: words are misspelt or replaced by synonyms, those that raise the model's loss most.

The search is greedy, as in TextFooler (Jin et al., arXiv 1907.11932): words by their importance, which is the loss without them; for each
the worst of its candidates. The misspellings are those of the perturbation `typos`, much as in TextBugger (Li et al., arXiv 1812.05271).
It needs losses, but no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.stress.perturb import Perturbation, random_of, replaced, split_prompt, typo, word_spans

Losses = Callable[[Sequence[Question]], list[float]]

TYPOS = (0.1, 0.3, 0.6, 0.9)  # of each kind one: letters swapped, doubled, left out, hit beside
# Words of questions about pictures that mean the same there. Names of objects, colours and numbers have none: they decide on the answer.
SYNONYMS = (
    ("image", "picture", "photo"),
    ("show", "depict", "display"),
    ("shown", "depicted", "displayed"),
    ("color", "colour"),
    ("near", "close to", "next to"),
    ("large", "big"),
    ("small", "little"),
    ("person", "individual"),
    ("people", "persons"),
    ("kind", "type", "sort"),
    ("visible", "in sight"),
    ("describe", "explain", "tell about"),
)


def attack_words(question: Question, attack: Perturbation, losses: Losses) -> Question:
    """Return a question in which up to the attack's share of the words is changed. `losses`: of the model's answer to the question as it
    is, after each of several wordings of it; a higher loss is a stronger attack."""
    text, rest = split_prompt(question.prompt)
    spans = word_spans(text)

    def reworded(changes: Mapping[tuple[int, int], str]) -> Question:
        return dataclasses.replace(question, prompt=replaced(text, changes) + rest)

    highest, *without = losses([question, *(reworded({span: ""}) for span in spans)])
    random, budget = random_of(question, attack), math.ceil(attack.value * len(spans))
    changes: dict[tuple[int, int], str] = {}
    for index in sorted(range(len(spans)), key=lambda index: -without[index]):
        if len(changes) == budget:
            break
        tried = [changes | {spans[index]: word} for word in candidates(text[slice(*spans[index])], random)]
        found = losses([reworded(each) for each in tried])
        if max(found) > highest:
            highest, changes = max(found), tried[int(np.argmax(found))]
    return reworded(changes)


def candidates(word: str, random: np.random.Generator) -> list[str]:
    """Return other forms of a word: misspellings at random places, and synonyms."""
    misspelt = [typo(word, kind, random.random()) for kind in TYPOS]
    same = [other for group in SYNONYMS if word.lower() in group for other in group if other != word.lower()]
    return list(dict.fromkeys([*misspelt, *(other.capitalize() if word[0].isupper() else other for other in same)]))
