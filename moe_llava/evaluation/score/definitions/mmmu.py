"""MMMU (Yue et al., arXiv 2311.16502), its validation split: questions from thirty subjects of college, with options or open, about one to
seven images.

Published reading of an option: letters in brackets, otherwise letters between blanks, otherwise, in answers of more than five words, the
options' texts; of several, the one that comes last. The published script guesses at random where it reads nothing, this counts it as wrong.
An open answer is right if, of the phrases that seem to hold the result and the numbers in them, one contains the expected text, or equals
the expected number to two decimals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import (
    LENIENT,
    LETTER,
    SINGLE_WORD,
    Benchmark,
    BenchmarkError,
    InlineImage,
    Question,
    Scored,
    take_text,
)
from moe_llava.evaluation.score.choices import judged, lettered, scored
from moe_llava.evaluation.score.reading import once

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
DISCIPLINE = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}
IMAGES = 7
IMAGE = re.compile(r"<image (\d)>")

# What comes after these may be the result.
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def questions(folder: Path) -> list[Question]:
    found = []
    seen: dict[str, str] = {}
    for subject in DISCIPLINE:
        for row, where in _rows(folder / subject):
            found.append(_question(row, subject, where))
            once(seen, "id", found[-1].id, where)
    return found


def _rows(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Of the hub's Parquet files, or of Arrow files as `datasets` saves them."""
    import pyarrow
    from pyarrow import ipc, parquet

    arrow = (file for file in folder.glob("validation/*.arrow") if not file.name.startswith("."))  # macOS's copies of attributes
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
    texts = _listed(take_text(row, "options", where))
    if kind == "multiple-choice" and not texts:
        raise BenchmarkError(f"{where} has the options {row['options']!r}, but must have a list of texts")
    options = lettered(texts) if kind == "multiple-choice" else {}
    if options:
        text += "\n" + "".join(f"({letter}) {option}\n" for letter, option in options.items())
    prompt, images = _with_images(text + (LETTER if options else SINGLE_WORD), row, where)
    extra = {"subject": subject, "options": options, "answer": answer}
    return Question(identity, prompt, tuple(InlineImage(f"{identity}_{number}", data) for number, data in images), extra)


def _listed(text: str) -> list[str]:
    """A list of texts that is written as Python writes it; nothing of all else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else []


def _with_images(prompt: str, row: Mapping[str, Any], where: str) -> tuple[str, list[tuple[int, bytes]]]:
    """The prompt with <image> for <image n>, and (n, image) in that order. Images that it does not mention stand before it."""
    there = {number: image["bytes"] for number in range(1, IMAGES + 1) if (image := row.get(f"image_{number}")) and image["bytes"]}
    mentioned = [int(number) for number in IMAGE.findall(prompt)]
    missing = [number for number in mentioned if number not in there]
    if missing:
        raise BenchmarkError(f"{where} mentions <image {missing[0]}>, but has no image_{missing[0]}")
    before = [number for number in there if number not in mentioned]
    return "<image>\n" * len(before) + IMAGE.sub("<image>", prompt), [(number, there[number]) for number in before + mentioned]


def read_letter(text: str, options: Mapping[str, str]) -> str | None:
    """As published, but for its guess."""
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
    """As published: phrases and numbers in normal form, one of which may be the answer."""
    phrases = []
    text = text.strip().strip(".").lower()
    parts = text.split("\n")
    for number, part in enumerate(parts, start=1):
        keys = KEYS + (("=",) if number == len(parts) else ())
        results = [part.split(key)[-1].strip() for key in keys if key in part]
        # The shortest, the first of several; one that is empty gives way to the next.
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
    """A number to two decimals, or lower case; a single letter must have a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def matches(found: set[str | float], answer: str) -> bool:
    """`answer`: a text, or several as Python writes a list."""
    forms = [form for text in _listed(answer) or [answer] for form in _normal(text)]
    return any(any(isinstance(form, str) and form in said for form in forms) if isinstance(said, str) else said in forms for said in found)


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    items, groups = [], []
    for question, text in zip(asked, given, strict=True):
        subject, options, answer = (question.extra[key] for key in ("subject", "options", "answer"))
        if options:
            item = judged(question, text, None if text is None else read_letter(text, options), options, answer, folder / subject)
        else:
            found = set() if text is None else read_open(text)
            right = matches(found, answer)
            item = {"id": question.id, "given": text, "read": sorted(map(str, found)), "expected": answer}
            item |= {"right": right, f"right{LENIENT}": right}
        items.append(item)
        groups.append(["accuracy", f"discipline/{DISCIPLINE[subject]}", f"subject/{subject}"])
    return scored(items, groups, [question.id for question in asked])


BENCHMARK = Benchmark(
    name="mmmu",
    title="MMMU",
    folder="MMMU",
    files=dict.fromkeys(DISCIPLINE, "the validation split, in Parquet files"),
    questions=questions,
    score=score,
    headline=("accuracy",),
)
