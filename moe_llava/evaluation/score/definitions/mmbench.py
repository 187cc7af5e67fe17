"""MMBench (Liu et al., arXiv 2307.06281), and in mmbench_cn.py the same in Chinese: a table of questions with up to four options, each
asked again with the options rotated. A question is right if all of its rotations are.

Published reading, as in VLMEvalKit before it asks a language model: exactly one option's letter among the words, punctuation apart; if no
single letter is there, exactly one option's text within the answer, in lower case. What neither reads counts as wrong.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from moe_llava.evaluation.score.benchmark import LENIENT, LETTER, Benchmark, BenchmarkError, InlineImage, Question, Scored, take
from moe_llava.evaluation.score.choices import judged, scored
from moe_llava.evaluation.score.reading import ENCODING, once, read_text

# A rotation's index is that of its question plus a multiple of this.
ROTATION = 1_000_000
CATEGORIES = ("category", "l2-category")
PUNCTUATION = str.maketrans(".()[],:;!*#{}", " " * 13)
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


def read_questions(file: Path, suffix: str) -> list[Question]:
    """Raises BenchmarkError, naming the row, if one is not as the header says or its index or image is damaged."""
    questions = []
    seen: dict[int, str] = {}
    for number, row in enumerate(_rows(file), start=1):
        where = f"row {number} of {file}"
        index, text = take(row, "index", where), take(row, "question", where)
        if not index.isdecimal():
            raise BenchmarkError(f"{where} has the index {index!r}, but must have a number")
        once(seen, "index", int(index), where)
        # All is text here, so an option may be "None" or "NA"; an empty cell is no option, and no hint.
        options = {letter: row[letter] for letter in "ABCD" if row.get(letter)}
        lines = ([row["hint"]] if row.get("hint") else []) + [text] + [f"{letter}. {option}" for letter, option in options.items()]
        image = InlineImage(f"{index}.jpg", _decoded(take(row, "image", where), where))
        extra = {"row": {key: value for key, value in row.items() if key != "image"}, "options": options}
        questions.append(Question(index, "\n".join(lines) + suffix, (image,), extra))
    return questions


def _rows(file: Path) -> Iterable[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # an image is longer than the usual limit
    text = read_text(file)
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True) if row]
    except (ValueError, csv.Error) as error:
        raise BenchmarkError(f"{file} is no table of tab-separated values: {error}") from error
    if twice := {name for name in header if header.count(name) > 1}:
        raise BenchmarkError(f"the header of {file} has the column {min(twice)!r} twice")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise BenchmarkError(f"row {number} of {file} has {len(row)} cells, but must have {len(header)}: {', '.join(header)}")
        yield dict(zip(header, row, strict=True))


def _decoded(image: str, where: str) -> bytes:
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BenchmarkError(f"{where} has an image that is not base64: {error}") from error


def read(text: str, options: Mapping[str, str]) -> str | None:
    """As published."""
    words = text.translate(PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def scorer(name: str) -> Callable[[Path, list[Question], list[str | None]], Scored]:
    """Of the table of this name."""

    def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
        return score_rotations(folder / name, asked, given)

    return score


def score_rotations(file: Path, asked: list[Question], given: list[str | None]) -> Scored:
    """Items are questions, with all of their rotations that were asked."""
    rotations: dict[str, list[dict[str, Any]]] = {}
    groups: dict[str, list[str]] = {}
    for question, text in zip(asked, given, strict=True):
        row, options, index = question.extra["row"], question.extra["options"], _without_rotation(question)
        item = judged(question, text, None if text is None else read(text, options), options, row["answer"], file)
        rotations.setdefault(index, []).append(item)
        groups.setdefault(index, ["accuracy", *(f"{key}/{row[key]}" for key in CATEGORIES if row.get(key))])
    return scored([_item(index, rows) for index, rows in rotations.items()], list(groups.values()), list(groups))


def _item(index: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a question, from those of its rotations: lists of what they have, and right if they all are."""
    lists = {key: [row[key] for row in rows] for key in ("given", "read", f"read{LENIENT}", "expected")}
    return {"id": index} | lists | {key: all(row[key] for row in rows) for key in ("right", f"right{LENIENT}")}


def _without_rotation(question: Question) -> str:
    """The index of the question of which this is a rotation."""
    return str(int(question.id) % ROTATION)


def uploader(name: str) -> Callable[[Path, list[Question], list[str | None], Path], list[Path]]:
    """To a file of this name."""

    def upload(folder: Path, asked: list[Question], given: list[str | None], out: Path) -> list[Path]:
        file = out / f"{name}.xlsx"
        write_excel(file, asked, given)
        return [file]

    return upload


def write_excel(file: Path, asked: list[Question], given: list[str | None]) -> None:
    """The table that the server takes, as LLaVA's script writes it: index, question, options, prediction, and what else there is. Where
    there is no answer, the prediction is empty."""
    book = Workbook()
    for line, cells in enumerate(upload_rows(asked, given), start=1):
        for column, value in enumerate(cells, start=1):
            cell = book.active.cell(line, column, ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer such as "=1" is no formula
    book.save(file)


def upload_rows(asked: list[Question], given: list[str | None]) -> list[list[Any]]:
    """The header, then a row for each question."""
    columns = [key for key in asked[0].extra["row"] if key not in NOT_UPLOADED] if asked else []
    place = columns.index("D") + 1 if "D" in columns else len(columns)
    rows: list[list[Any]] = [columns[:place] + ["prediction"] + columns[place:]]
    for question, text in zip(asked, given, strict=True):
        cells: list[Any] = [int(value) if key == "index" else value for key, value in question.extra["row"].items() if key in columns]
        rows.append(cells[:place] + [text or ""] + cells[place:])
    return rows


def splitter(name: str) -> Callable[[Benchmark, Path], Benchmark]:
    """By the header of the table of this name."""

    def split(benchmark: Benchmark, folder: Path) -> Benchmark:
        with (folder / name).open(encoding=ENCODING, errors="replace") as stream:
            header = stream.readline().split("\t")
        return benchmark if "answer" in map(str.strip, header) else replace(benchmark, score=None)

    return split


def mmbench(name: str, title: str, folder: str, table: str, suffix: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        folder=folder,
        files={table: "questions, images and answers"},
        questions=lambda place: read_questions(place / table, suffix),
        score=scorer(table),
        headline=("accuracy",),
        upload=uploader(folder),
        split=splitter(table),
        max_new_tokens=1024,
    )


BENCHMARK = mmbench("mmbench", "MMBench", "mmbench", "mmbench_dev_20230712.tsv", LETTER)
