"""Multiple choice: read the letter of an option from an answer.

Each benchmark's file has its published reading. The lenient reading is the same for all: the published one, or else whatever names exactly
one option, in the order of `read_leniently`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import LENIENT
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError

LETTERS = string.ascii_uppercase
Reader = Callable[[str, Mapping[str, str]], str | None]  # answer, options -> letter

# "(A)", "**b**", "A."
ALONE = re.compile(r"\W*([A-Za-z])\W*")
# "A. because", "b) red", "B: red", and "B, no", but not "A, B"
FIRST = re.compile(r"\W*([A-Za-z])(?:\s?[\])}.:*-]+(?:\s|$)|,\s+[a-z])")
# "The answer is A", "Answer: (b).", "Option C", but neither "the answer is a dog" nor "the answer is A or B"
SINGLE = r"(?:([A-Z])(?![A-Za-z0-9]|\s*(?:and|or|[,/&])\s*\(?[A-Z](?![A-Za-z]))|([a-z])(?=\W*$|[).:]))"
NAMED = (
    re.compile(r"(?i:\b(?:answer|option|choice))\W*(?i:(?:is|would be|must be)\W+)?(?i:(?:option|choice)\W+)?" + SINGLE),
    re.compile(r"(?:答案|选项|选择|选)\W*[是为]?\W*" + SINGLE),
)


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Return letter -> text."""
    return dict(zip(LETTERS, options, strict=False))


def options_in(prompt: str) -> dict[str, str]:
    """Return letter -> text from the lines "A. text", "B. text" and so on, or "(A) text", "A) text", "A: text"."""
    options: dict[str, str] = {}
    letters = iter(LETTERS)
    letter = next(letters)
    for line in prompt.split("\n"):
        if found := re.match(rf"(?:{letter}[.):]|\({letter}\))(.*)", line):
            options[letter] = found[1].strip()
            letter = next(letters, "\0")  # no line begins with it
    return options


def read_leniently(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that an answer names: by a letter alone, the option's own text, a letter at the start, a phrase such
    as "the answer is A", or the option's text among other words. The first of these that finds an option decides. Return None if it finds
    several, or if none finds one."""
    for found in _readings(unicodedata.normalize("NFKC", text).replace("_", " "), options):
        letters = {letter.upper() for letter in found}
        if len(letters) > 1:
            return None
        if letters & options.keys():
            return letters.pop()
    return None


def _readings(text: str, options: Mapping[str, str]) -> Iterator[list[str]]:
    alone = ALONE.fullmatch(text)
    yield [alone[1]] if alone else []
    yield [letter for letter, option in options.items() if _core(option) and _core(option) == _core(text)]
    first = FIRST.match(text)
    yield [first[1]] if first else []
    yield [upper or lower for pattern in NAMED for upper, lower in pattern.findall(text)]
    yield _mentioned(_core(text), {letter: _core(option) for letter, option in options.items()})


def _core(text: str) -> str:
    """Return a text in lower case, without punctuation at its ends."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("_", " ").casefold().split()).strip(" .,;:!?*\"'()[]。")


def _mentioned(text: str, options: Mapping[str, str]) -> list[str]:
    """Return the letters of the options whose words occur, longest first: "dark red" does not mention "red"."""
    letters = []
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        if not option or re.fullmatch("[a-z]", option):  # "a" is an article
            continue
        text, count = re.subn(whole_words(option), "\0", text)
        letters += [letter] * bool(count)
    return letters


def whole_words(phrase: str) -> str:
    """Return a pattern of a phrase, in lower case, among other words. \\b would not do: Chinese has no blanks between words, and 2.5 does
    not mention 5."""
    return rf"(?<![a-z0-9.-]){re.escape(phrase)}(?!\.?[a-z0-9])"


def judged(question: Question, text: str | None, read: Reader, options: Mapping[str, str], expected: str, file: Path) -> dict[str, Any]:
    """Return the item of a question; `read` is the published reading. Raises BenchmarkError if the expected letter is not an option."""
    if expected not in list(options):  # a list, because `expected` may be of any type
        raise BenchmarkError(f"question {question.id} of {file} has the answer {expected!r}, but the options {', '.join(options)}")
    letter = None if text is None else read(text, options)
    leniently = letter if letter in options or text is None else read_leniently(text, options)
    return {
        "id": question.id,
        "given": text,
        "read": letter,
        f"read{LENIENT}": leniently,
        "expected": expected,
        "right": letter == expected,
        f"right{LENIENT}": leniently == expected,
    }
