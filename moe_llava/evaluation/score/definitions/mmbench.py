"""MMBench (Liu et al., arXiv 2307.06281), and its Chinese version in mmbench_cn.py: a table of questions with up to four options, each
repeated with the options rotated. A question is right if all of its rotations are.

Published reading, as in VLMEvalKit before it queries a language model: exactly one option's letter among the words, punctuation apart; if
there is no single letter, exactly one option's text within the answer, in lower case. What neither reads counts as wrong.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from moe_llava.common.images import InlineImage
from moe_llava.evaluation.score.benchmark import LENIENT, Benchmark, Scored
from moe_llava.evaluation.score.choices import judged
from moe_llava.evaluation.score.means import mean_by_group
from moe_llava.evaluation.score.questions import LETTER, Answers, Question
from moe_llava.evaluation.score.reading import ENCODING, BenchmarkError, once, read_text, take

# A rotation's index is its question's plus a multiple of this.
ROTATION = 1_000_000
CATEGORIES = ("category", "l2-category")
PUNCTUATION = str.maketrans(".()[],:;!*#{}", " " * 13)
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


def read_questions(file: Path, suffix: str) -> list[Question]:
    """Read a table. Raises BenchmarkError, naming the row, if one does not fit the header or has a damaged index or image."""
    questions = []
    seen: dict[int, str] = {}
    for number, row in enumerate(_rows(file), start=1):
        where = f"row {number} of {file}"
        index, text = take(row, "index", where), take(row, "question", where)
        if not index.isdecimal():
            raise BenchmarkError(f"{where} has the index {index!r}, but must have a number")
        once(seen, "index", int(index), where)
        # All cells are text, so an option may be "None" or "NA"; an empty cell is no option, and no hint.
        options = {letter: row[letter] for letter in "ABCD" if row.get(letter)}
        lines = ([row["hint"]] if row.get("hint") else []) + [text] + [f"{letter}. {option}" for letter, option in options.items()]
        try:
            image = InlineImage(f"{index}.jpg", base64.b64decode(take(row, "image", where), validate=True))
        except (binascii.Error, ValueError) as error:
            if isinstance(error, BenchmarkError):
                raise
            raise BenchmarkError(f"{where} has an image that is not base64: {error}") from error
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


def read(text: str, options: Mapping[str, str]) -> str | None:
    """Read a letter as published."""
    words = text.translate(PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def score_rotations(file: Path, questions: list[Question], answers: Answers) -> Scored:
    """Score questions with all of their rotations; an item is a question."""
    rotations: dict[str, list[dict[str, Any]]] = {}
    groups: dict[str, list[str]] = {}
    for question, text in zip(questions, answers, strict=True):
        row, options, index = question.extra["row"], question.extra["options"], str(int(question.id) % ROTATION)
        item = judged(question, text, read, options, row["answer"], file)
        rotations.setdefault(index, []).append(item)
        groups.setdefault(index, ["accuracy", *(f"{key}/{row[key]}" for key in CATEGORIES if row.get(key))])
    return mean_by_group([_item(index, rows) for index, rows in rotations.items()], list(groups.values()), list(groups))


def _item(index: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the item of a question: lists of what its rotations have, and right if they all are."""
    lists = {key: [row[key] for row in rows] for key in ("given", "read", f"read{LENIENT}", "expected")}
    return {"id": index} | lists | {key: all(row[key] for row in rows) for key in ("right", f"right{LENIENT}")}


def write_excel(file: Path, questions: list[Question], answers: Answers) -> list[Path]:
    """Write the table that the server takes, as LLaVA's script does: index, question, options, prediction, and the other columns. The
    prediction of a question without an answer is empty."""
    book = Workbook()
    for line, cells in enumerate(upload_rows(questions, answers), start=1):
        for column, value in enumerate(cells, start=1):
            cell = book.active.cell(line, column, ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer such as "=1" is no formula
    book.save(file)
    return [file]


def upload_rows(questions: list[Question], answers: Answers) -> list[list[Any]]:
    """Return the header, and a row for each question."""
    columns = [key for key in questions[0].extra["row"] if key not in NOT_UPLOADED] if questions else []
    place = columns.index("D") + 1 if "D" in columns else len(columns)
    rows: list[list[Any]] = [columns[:place] + ["prediction"] + columns[place:]]
    for question, text in zip(questions, answers, strict=True):
        cells: list[Any] = [int(value) if key == "index" else value for key, value in question.extra["row"].items() if key in columns]
        rows.append(cells[:place] + [text or ""] + cells[place:])
    return rows


def mmbench(name: str, title: str, folder: str, table: str, suffix: str) -> Benchmark:
    def split(benchmark: Benchmark, place: Path) -> Benchmark:
        with (place / table).open(encoding=ENCODING, errors="replace") as stream:
            header = stream.readline().split("\t")
        return benchmark if "answer" in map(str.strip, header) else replace(benchmark, score=None)

    return Benchmark(
        name=name,
        title=title,
        folder=folder,
        files={table: "questions, images and answers"},
        questions=lambda place: read_questions(place / table, suffix),
        score=lambda place, questions, answers: score_rotations(place / table, questions, answers),
        upload=lambda _, questions, answers, out: write_excel(out / f"{folder}.xlsx", questions, answers),
        split=split,
        max_new_tokens=1024,
    )


BENCHMARK = mmbench("mmbench", "MMBench", "mmbench", "mmbench_dev_20230712.tsv", LETTER)
