"""MMMU (Yue et al., arXiv 2311.16502), validation split: questions from thirty college subjects, with options or open, about one to seven
images.

Published reading of an option: letters in brackets, otherwise letters between blanks, otherwise, in answers of more than five words, the
options' texts; of several, the last in the answer. If it reads nothing, the published script guesses at random; here that counts as wrong.
An open answer is right if one of the phrases that seem to hold the result contains the expected text, or one of their numbers equals the
expected number to two decimals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_llava.common.images import InlineImage
from moe_llava.evaluation.score.benchmark import LENIENT, Benchmark, Scored
from moe_llava.evaluation.score.choices import judged, lettered
from moe_llava.evaluation.score.means import mean_by_group
from moe_llava.evaluation.score.questions import LETTER, SINGLE_WORD, Answers, Question
from moe_llava.evaluation.score.reading import BenchmarkError, once, take_text

_MEDICINE = "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
_ENGINEERING = "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials Mechanical_Engineering"
DISCIPLINES = {
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"],
    "Health and Medicine": _MEDICINE.split(),
    "Humanities and Social Science": ["History", "Literature", "Sociology", "Psychology"],
    "Tech and Engineering": _ENGINEERING.split(),
}
DISCIPLINE = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}
IMAGES = 7
IMAGE = re.compile(r"<image (\d)>")

# The result may follow one of these.
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+", r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def questions(folder: Path) -> list[Question]:
    found = []
    seen: dict[str, str] = {}
    for subject in DISCIPLINE:
        for row, where in _rows(folder / subject):
            found.append(_question(row, subject, where))
            once(seen, "id", found[-1].id, where)
    return found


def _rows(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (row, its place) from the hub's Parquet files, or from Arrow files as `datasets` saves them."""
    import pyarrow
    from pyarrow import ipc, parquet

    arrow = (file for file in folder.glob("validation/*.arrow") if not file.name.startswith("."))  # hidden files of macOS
    files = sorted(folder.glob("validation*.parquet")) or sorted(arrow)
    if not files:
        raise BenchmarkError(f"{folder} must have files validation*.parquet or validation/*.arrow, but has neither")
    for file in files:
        try:
            table = parquet.read_table(file) if file.suffix == ".parquet" else ipc.open_stream(file.read_bytes()).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise BenchmarkError(f"{file} cannot be read: {error}") from error
        for number, row in enumerate(table.to_pylist(), start=1):
            yield row, f"row {number} of {file}"


def _question(row: Mapping[str, Any], subject: str, where: str) -> Question:
    identity, text, kind, answer = (take_text(row, key, where) for key in ("id", "question", "question_type", "answer"))
    if kind not in ("multiple-choice", "open"):
        raise BenchmarkError(f"{where} has the question_type {kind!r}, but must have multiple-choice or open")
    texts = _parse_list(take_text(row, "options", where))
    if kind == "multiple-choice" and not texts:
        raise BenchmarkError(f"{where} has the options {row['options']!r}, but must have a list of texts")
    options = lettered(texts) if kind == "multiple-choice" else {}
    if options:
        text += "\n" + "".join(f"({letter}) {option}\n" for letter, option in options.items())
    prompt, images = _with_images(text + (LETTER if options else SINGLE_WORD), row, where)
    extra = {"subject": subject, "options": options, "answer": answer}
    return Question(identity, prompt, tuple(InlineImage(f"{identity}_{number}", data) for number, data in images), extra)


def _parse_list(text: str) -> list[str]:
    """Parse a list of texts in Python's notation; an empty list for anything else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else []


def _with_images(prompt: str, row: Mapping[str, Any], where: str) -> tuple[str, list[tuple[int, bytes]]]:
    """Return the prompt with <image> for <image n>, and (n, image) in that order. Images that it does not mention come first."""
    there = {number: image["bytes"] for number in range(1, IMAGES + 1) if (image := row.get(f"image_{number}")) and image["bytes"]}
    mentioned = [int(number) for number in IMAGE.findall(prompt)]
    missing = [number for number in mentioned if number not in there]
    if missing:
        raise BenchmarkError(f"{where} mentions <image {missing[0]}>, but has no image_{missing[0]}")
    before = [number for number in there if number not in mentioned]
    return "<image>\n" * len(before) + IMAGE.sub("<image>", prompt), [(number, there[number]) for number in before + mentioned]


def read_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Read a letter as published, without the guess."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    lower = text.lower()
    places = {letter: text.rfind(f"({letter})") for letter in options}
    if max(places.values()) < 0:
        places = {letter: text.rfind(f" {letter} ") for letter in options}
    if max(places.values()) < 0 and len(text.split()) > 5:
        places = {letter: lower.rfind(option.lower()) for letter, option in options.items()}
    last = max(options, key=lambda letter: places[letter])
    return last if places[last] >= 0 else None


def read_open(text: str) -> set[str | float]:
    """Read an open answer as published: normalised phrases and numbers, one of which may be the answer."""
    phrases = []
    text = text.strip().strip(".").lower()
    parts = text.split("\n")
    for number, part in enumerate(parts, start=1):
        keys = KEYS + (("=",) if number == len(parts) else ())
        results = [part.split(key)[-1].strip() for key in keys if key in part]
        # The shortest, and the first of these; an empty one is replaced by the next.
        shortest = ""
        for found in results:
            if not shortest or len(found) < len(shortest):
                shortest = found
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    phrases = phrases or [text]
    numbers = [number for phrase in phrases for pattern in NUMBERS for number in re.findall(pattern, phrase)]
    return {form for found in phrases + numbers for form in _normal(found)}


def _normal(text: str) -> list[str | float]:
    """Return a number to two decimals, or a text in lower case; a single letter must have a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def matches(found: set[str | float], answer: str) -> bool:
    """Return whether one of the readings is the expected answer: a text, or several in Python's notation."""
    forms = [form for text in _parse_list(answer) or [answer] for form in _normal(text)]
    texts = [form for form in forms if isinstance(form, str)]
    return any(any(text in read for text in texts) if isinstance(read, str) else read in forms for read in found)


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    items, groups = [], []
    for question, text in zip(questions, answers, strict=True):
        subject, options, answer = (question.extra[key] for key in ("subject", "options", "answer"))
        if options:
            item = judged(question, text, read_letter, options, answer, folder / subject)
        else:
            found = set() if text is None else read_open(text)
            right = matches(found, answer)
            item = {"id": question.id, "given": text, "read": sorted(map(str, found)), "expected": answer}
            item |= {"right": right, f"right{LENIENT}": right}
        items.append(item)
        groups.append(["accuracy", f"discipline/{DISCIPLINE[subject]}", f"subject/{subject}"])
    return mean_by_group(items, groups, [question.id for question in questions])


BENCHMARK = Benchmark(
    name="mmmu",
    title="MMMU",
    folder="MMMU",
    files=dict.fromkeys(DISCIPLINE, "the validation split, in Parquet files"),
    questions=questions,
    score=score,
)
