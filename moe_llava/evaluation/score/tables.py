"""Many results in one table: a row per model, a column per main score. Published scores have their own block."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from moe_llava.evaluation.score import published
from moe_llava.evaluation.score.benchmark import NAMES, find_benchmark
from moe_llava.evaluation.score.reading import BenchmarkError, read_object, take, take_list

FIELDS = ("source", "model", "benchmark", "score", "value", "low", "high", "questions", "missing", "judge")


@dataclass(frozen=True)
class Column:
    """A main score of a benchmark. Scores by different judges are different columns, because they do not compare."""

    benchmark: str
    title: str
    score: str = ""
    judge: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """A measured score as it is stored, with its 95% interval, or a published one as it was printed. `shown`: see Benchmark."""

    value: float | str
    low: float | None = None
    high: float | None = None
    questions: int | None = None
    missing: int | None = None
    shown: int = 1

    def __str__(self) -> str:
        return self.value if isinstance(self.value, str) else _rounded(self.shown * self.value)

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"{_rounded(self.shown * self.low)} to {_rounded(self.shown * self.high)}"


def _rounded(value: float) -> str:
    """Return a number with four digits, including zeros at the end."""
    return f"{value:#.4g}".rstrip(".")


@dataclass(frozen=True)
class Block:
    """A part of the table. `rows`: model -> its cells."""

    source: str
    title: str
    notes: list[str]
    columns: list[Column]
    rows: dict[str, dict[Column, Cell]]


def write_table(results: Sequence[Path], form: str, reference: bool) -> str:
    """Return the text of the table. `results`: result.json files, or folders that hold BENCHMARK/result.json.

    Raises BenchmarkError, naming the file, if one is missing or lacks something, or if two have the same score of the same model.
    """
    if form not in FORMS:
        raise BenchmarkError(f"--format is {form!r}, but must be one of {', '.join(FORMS)}")
    return FORMS[form]([_measured(results)] + ([_published()] if reference else []))


def find_results(places: Sequence[Path]) -> list[Path]:
    """Return the result files in places. Raises BenchmarkError for a place without results."""
    files: list[Path] = []
    for place in places:
        found = sorted(place.glob("*/result.json")) if place.is_dir() else [place]
        if not found or not found[0].is_file():
            rule = "has no BENCHMARK/result.json" if place.is_dir() else "does not exist"
            raise BenchmarkError(f"{place} {rule}; give result.json files, or folders that hold BENCHMARK/result.json")
        files += found
    return files


def _measured(places: Sequence[Path]) -> Block:
    rows: dict[str, dict[Column, Cell]] = {}
    origin: dict[tuple[str, Column], Path] = {}
    notes = ["In brackets: 95% bootstrap intervals."]
    results = [(file, *read_result(file)) for file in find_results(places)]
    names = _short({model for _, model, *_ in results})
    for file, path, cells, remarks in results:
        model = names[path]
        for column in cells:
            first = origin.setdefault((model, column), file)
            if first is not file:
                raise BenchmarkError(f"{first} and {file} are both results of {model!r} in {column.benchmark}: give one of them")
        rows.setdefault(model, {}).update(cells)
        notes += [f"{model}, {remark}" for remark in remarks]
    columns = sorted({column for row in rows.values() for column in row}, key=_place)
    for column in columns:
        counts = {model: row[column].questions for model, row in rows.items() if column in row}
        if len(set(counts.values())) > 1:
            notes.append(f"{_head(column)}: not the same questions: {', '.join(f'{model} {n:,}' for model, n in counts.items())}.")
    return Block("measured", "Measured", notes, columns, rows)


def _short(models: Iterable[str]) -> dict[str, str]:
    """Return model -> its name in the table: for a folder, the part of its path that differs from the others."""
    folders = [model for model in models if Path(model).is_absolute()]
    root = os.path.commonpath([Path(folder).parent for folder in folders]) if folders else ""
    names = {model: str(Path(model).relative_to(root)) if model in folders else model for model in models}
    return {model: name if list(names.values()).count(name) == 1 else model for model, name in names.items()}


def read_result(file: Path) -> tuple[str, dict[Column, Cell], list[str]]:
    """Return (model, its main scores, remarks on them)."""
    record = read_object(file)
    name = take(record, "benchmark", str(file))
    if name not in NAMES:
        raise BenchmarkError(f"{file} is of the benchmark {name!r}; there are {', '.join(NAMES)}")
    benchmark = find_benchmark(name)
    model, scores, intervals, questions = (take(record, key, str(file)) for key in ("model", "scores", "intervals", "questions"))
    missing = take_list(record, "missing", str(file))
    judge = str(take(record["judge"], "model", f"judge of {file}")) if "judge" in record else ""
    if "perturbation" in record:
        kind, strength = (take(record["perturbation"], key, f"perturbation of {file}") for key in ("name", "strength"))
        model = f"{model} under {kind}:{strength}"
    cells, title = {}, benchmark.title
    if not benchmark.folder:  # different files, or metrics, are different columns
        title = f"{take(record, 'data', str(file))} by {take(record, 'metric', str(file))}"
    for score in benchmark.headline:
        if isinstance(scores, dict) and score not in scores:
            few = f"too few questions of {title} were evaluated: evaluate without --limit, or leave it out"
            raise BenchmarkError(f"{file} has no score {score!r}, because {few}")
        numbers = [take(scores, score, f"scores of {file}"), *take_list(intervals, score, f"intervals of {file}")]
        if len(numbers) != 3 or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise BenchmarkError(f"{file} must have a number and an interval of two numbers for {score!r}, but has {numbers}")
        value, low, high = numbers
        cells[Column(benchmark.name, title, score, judge, benchmark.unit)] = Cell(
            value, low, high, questions, len(missing), benchmark.shown
        )
    return str(model), cells, [f"{title}: {remark}" for remark in _remarks(record, questions, missing)]


def _remarks(record: dict[str, Any], questions: int, missing: list[Any]) -> Iterator[str]:
    there = record.get("questions_in_all")
    if there not in (None, questions):
        yield f"the first {questions:,} of {there:,} questions only."
    for token, number in record.get("end_tokens", {}).items():
        yield f"{number:,} of {questions:,} answers end with {token}, which scores count as part of the answer."
    unreadable = record.get("unreadable", [])
    for words, ids in (("without an answer, counted as wrong", missing), ("whose judgement could not be read", unreadable)):
        if ids:
            yield f"{len(ids)} of {questions:,} questions {words}."


def _place(column: Column) -> tuple[Any, ...]:
    headline = find_benchmark(column.benchmark).headline
    return list(NAMES).index(column.benchmark), headline.index(column.score), column.judge, column.title


def _published() -> Block:
    columns = [Column(name, heading) for name, heading in published.COLUMNS.items()]
    rows = {
        model: {column: Cell(value) for column, value in zip(columns, values.split(), strict=True) if value != "-"}
        for model, values in published.ROWS.items()
    }
    return Block("published", f"Published, not measured here: {published.SOURCE}", [published.NOTE], columns, rows)


def _head(column: Column) -> str:
    judge = f"judge {column.judge}" if column.judge else ""
    return ", ".join(part for part in (column.title, column.score, judge, column.unit) if part)


def _markdown(blocks: list[Block]) -> str:
    return "\n".join(_markdown_block(block) for block in blocks)


def _markdown_block(block: Block) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"

    lines = [f"## {block.title}", "", line(["model", *map(_head, block.columns)]), line(["---", *("---:" for _ in block.columns)])]
    for model, row in block.rows.items():
        cells = [row.get(column) for column in block.columns]
        lines.append(line([model, *("" if cell is None else f"{cell} [{cell.interval}]".removesuffix(" []") for cell in cells)]))
    return "\n".join([*lines, "", *(f"- {_escaped(note)}" for note in block.notes), ""])


def _escaped(text: str) -> str:
    """Return a text in one line, without cell ends and tags."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _csv(blocks: list[Block]) -> str:
    """Return a line per score, with all digits of each number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    for block in blocks:
        for model, row in block.rows.items():
            for column, cell in row.items():
                numbers = (cell.value, cell.low, cell.high, cell.questions, cell.missing)
                writer.writerow([block.source, model, column.benchmark, column.score, *numbers, column.judge])
    return text.getvalue()


def _html(blocks: list[Block]) -> str:
    """Return a page that needs no other file."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "table.html.jinja").read_text(encoding="utf-8"))
    return template.render(blocks=blocks) + "\n"


FORMS = {"markdown": _markdown, "csv": _csv, "html": _html}
