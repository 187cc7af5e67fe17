"""Metrics of short answers: how many points, from 0 to 1, an answer gets by the expected one.

A metric reads the same thing from both, a number for instance, and compares what it read. An answer without such a thing gets no point; an
expected answer without it cannot be judged by this metric.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_llava.common.messages import did_you_mean
from moe_llava.evaluation.score.choices import options_in, read_leniently, whole_words
from moe_llava.evaluation.score.normalise import NUMBERS, strip_punctuation, vqa
from moe_llava.evaluation.score.reading import BenchmarkError

# 7, -7, 1,000, 0.5 and .5, but no digit of A4; and the words that VQA's normalisation knows.
_NUMBER = re.compile(rf"(?<![\w.])-?(?:\d+(?:,\d{{3}}(?!\d))*(?:\.\d+)?|\.\d+)|\b(?:{'|'.join(NUMBERS)})\b")


@dataclass(frozen=True)
class Metric:
    """`read`: from a text and its question, what is compared; None if there is none. `rule`: what an expected answer must hold. `points`:
    from what was read in the answer and in the expected answer."""

    read: Callable[[str, str], Any]
    rule: str
    points: Callable[[Any, Any], float] = lambda read, expected: float(read == expected)


def find_metric(name: Any, where: str) -> str:
    """Return the name of a metric. Raises BenchmarkError, naming the place, if there is none of this name."""
    if name not in list(METRICS):  # a list, because `name` may be of any type
        guess = did_you_mean(str(name), METRICS, ".")
        raise BenchmarkError(f"{where} is {name!r}{guess} There are {', '.join(METRICS)}")
    return str(name)


def normal(text: str) -> str:
    """Normalise an answer as VQA does, but keep one that has only an article, such as the grade A, or only signs."""
    return vqa(text) or " ".join(strip_punctuation(text).lower().split()) or text.strip().lower()


def says_yes_leniently(text: str) -> bool | None:
    """Return whether the first word that says yes or no says yes; None if there is no such word."""
    for word in re.findall(r"[a-z']+", text.lower()):
        if word in ("yes", "yeah", "yep"):
            return True
        if word in ("no", "not", "none", "nope") or word.endswith("n't"):
            return False
    return None


def first_number(text: str) -> float | None:
    """Return the first number in a text, in digits or as a word from zero to ten; None if there is none."""
    found = _NUMBER.search(text.lower())
    return None if found is None else float(NUMBERS.get(found[0], found[0]).replace(",", ""))


def word_f1(words: list[str], expected: list[str]) -> float:
    """Return the F1 of the words, each counted as often as it occurs, as in SQuAD (Rajpurkar et al., arXiv 1606.05250)."""
    return 2 * (Counter(words) & Counter(expected)).total() / (len(words) + len(expected))


METRICS = {
    "exact": Metric(lambda text, question: normal(text), "a text"),
    "contains": Metric(
        lambda text, question: normal(text), "a text", lambda read, expected: float(re.search(whole_words(expected), read) is not None)
    ),
    "yes_no": Metric(lambda text, question: says_yes_leniently(text), "a yes or a no"),
    "choice": Metric(
        lambda text, question: read_leniently(text, options_in(question)),
        "the letter or the text of one of the question's options, which are lines such as 'A. red' or '(A) red'",
    ),
    "number": Metric(lambda text, question: first_number(text), "a number, in digits or as a word from zero to ten"),
    "word_f1": Metric(lambda text, question: normal(text).split(), "a text", word_f1),
}
