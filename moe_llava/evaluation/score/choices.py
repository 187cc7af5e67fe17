"""Multiple choice: reading an option's letter from an answer, and accuracies of what was read.

How a benchmark's own script reads stands in the benchmark's file. The lenient reading is the same for all: what that script reads, and
otherwise whatever names exactly one option, in the order of `read_leniently`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import LENIENT, BenchmarkError, Columns, Question, Scored, share

LETTERS = string.ascii_uppercase

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
    """Letter -> text."""
    return dict(zip(LETTERS, options, strict=False))


def options_in(prompt: str) -> dict[str, str]:
    """Letter -> text, of the lines "A. text", "B. text" and so on."""
    options: dict[str, str] = {}
    for line in prompt.split("\n"):
        letter = LETTERS[len(options)]
        if line.startswith(f"{letter}."):
            options[letter] = line[2:].strip()
    return options


def read_leniently(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that an answer names: by a letter alone, the option's own text, a letter at the start, a phrase such as
    "the answer is A", the option's text among other words. The first of these that finds an option decides; None if it finds several, or
    nothing finds one."""
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
    """In lower case, without punctuation at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("_", " ").casefold().split()).strip(" .,;:!?*\"'()[]。")


def _mentioned(text: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options whose words occur. The longest are looked for first: "dark red" does not mention "red"."""
    letters = []
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        if not option or re.fullmatch("[a-z]", option):  # "a" is an article
            continue
        # Not \b: Chinese has no blanks between words. Nor is 5 mentioned in 2.5.
        text, count = re.subn(rf"(?<![a-z0-9.-]){re.escape(option)}(?!\.?[a-z0-9])", "\0", text)
        letters += [letter] * bool(count)
    return letters


def judged(question: Question, text: str | None, read: str | None, options: Mapping[str, str], expected: str, file: Path) -> dict[str, Any]:
    """The item of a question, where `read` is what the published script reads.

    Raises BenchmarkError if the expected letter is none of the options.
    """
    if expected not in list(options):  # which may be of any type
        raise BenchmarkError(f"question {question.id} of {file} has the answer {expected!r}, but the options {', '.join(options)}")
    leniently = read if read in options or text is None else read_leniently(text, options)
    return {
        "id": question.id,
        "given": text,
        "read": read,
        f"read{LENIENT}": leniently,
        "expected": expected,
        "right": read == expected,
        f"right{LENIENT}": leniently == expected,
    }


def scored(items: list[dict[str, Any]], groups: Sequence[Sequence[str]], units: list[str]) -> Scored:
    """Accuracies in percent. `groups`: for each item, the names of those it counts for; one with a slash is part of a whole."""
    names = sorted({name for group in groups for name in group}, key=lambda name: ("/" in name, name))
    columns = {suffix: np.array([item[f"right{suffix}"] for item in items], dtype=float) for suffix in ("", LENIENT)}
    columns |= {name: np.array([name in group for group in groups], dtype=float) for name in names}
    return Scored(items, columns, units, _measure)


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    names = [name for name in columns if name not in ("", LENIENT)]
    counts = {name: float(weights @ columns[name]) for name in names}
    scores: dict[str, float] = {}
    for suffix in ("", LENIENT):
        hits = weights * columns[suffix]
        scores |= {f"{name}{suffix}": share(float(hits @ columns[name]), counts[name]) * 100 for name in names}
    return scores
