"""What a benchmark is: where its questions are, how answers to them are scored, what an upload looks like. Each has a file of its own in
benchmarks/, with one `BENCHMARK`.

Answers are paired with questions by id, never by order. A question without an answer is named, and counts as wrong.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from moe_llava.evaluation.statistics import bootstrap

if TYPE_CHECKING:
    from moe_llava.evaluation.judge import Judge

# Name -> its module in benchmarks/.
NAMES = {
    "vqav2": "vqav2",
    "gqa": "gqa",
    "vizwiz": "vizwiz",
    "scienceqa": "scienceqa",
    "textvqa": "textvqa",
    "pope": "pope",
    "mme": "mme",
    "mmbench": "mmbench",
    "mmbench-cn": "mmbench_cn",
    "seed-bench": "seed_bench",
    "llava-bench": "llava_bench",
    "mm-vet": "mm_vet",
    "mmmu": "mmmu",
    "digits": "digits_world",
}

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

ENCODING = "utf-8-sig"  # UTF-8; some editors put a mark in front of it

Columns = Mapping[str, np.ndarray]


class BenchmarkError(ValueError):
    """Something is wrong with a benchmark's files, or with answers to it; the message names file, place, value and rule."""


@dataclass(frozen=True)
class InlineImage:
    """An image that stands in a question file itself."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        return BytesIO(self.data)


@dataclass(frozen=True)
class Question:
    """`id` as the benchmark has it, which may repeat where the prompts differ. `prompt`: all of the text that a model gets; images stand
    before it, or where it says `<image>`. `extra`: what scoring needs to know."""

    id: str
    prompt: str
    images: tuple[Path | InlineImage, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What became of the answers, item by item, N in all.

    `items`: for people: id, given, read as, expected, right. `columns`: [N] numbers each. `units`: what the bootstrap draws together, such
    as all questions about an image. `measure`: from columns and the weight [N] of each item to scores, in the benchmark's own unit; NaN
    for a group of which there is nothing. A score named "x (lenient)" is x by a more forgiving reading of the answers; it is reported
    where it differs. `strata`: of each item, what the bootstrap keeps at its number of units, where a score is a sum over these.
    """

    items: list[dict[str, Any]]
    columns: Columns
    units: list[str]
    measure: Callable[[Columns, np.ndarray], dict[str, float]]
    strata: list[str] | None = None


@dataclass(frozen=True)
class Benchmark:
    """`folder`: its name in LLaVA's evaluation folder. `files`: what is needed there, path -> what for; of "a | b" one is enough.
    `questions`: from the folder.
    `score`: from folder, questions, and what was given to each, None where nothing was; None if only a server or a judge can.
    `upload`: writes what the benchmark's server takes, from the same and a folder to write into, and returns the files. `judge`: scores by
    the opinion of a language model; items have "read", None where it could not be read. `headline`: the scores to show in a table.
    `split`: of a benchmark with several, see `split_in`."""

    name: str
    title: str
    folder: str
    files: dict[str, str]
    questions: Callable[[Path], list[Question]]
    score: Callable[[Path, list[Question], list[str | None]], Scored] | None = None
    upload: Callable[[Path, list[Question], list[str | None], Path], list[Path]] | None = None
    max_new_tokens: int = 128
    judge: Callable[[Path, list[Question], list[str | None], Judge], Scored] | None = None
    headline: tuple[str, ...] = ()
    split: Callable[[Benchmark, Path], Benchmark] | None = None


def find_benchmark(name: str) -> Benchmark:
    """Raises BenchmarkError if there is none of this name."""
    if name not in NAMES:
        guess = difflib.get_close_matches(name.lower(), NAMES, n=1)
        hint = f"; did you mean {guess[0]}?" if guess else "."
        raise BenchmarkError(f"no benchmark is called {name!r}{hint} There are {', '.join(NAMES)}")
    module = importlib.import_module(f"moe_llava.evaluation.benchmarks.{NAMES[name]}")
    return module.BENCHMARK


def find_folder(benchmark: Benchmark, data: Path) -> Path:
    """The benchmark's own folder: `data`, or the one in it that has the name that LLaVA's evaluation gives it.

    Raises BenchmarkError, naming every file that is missing.
    """
    missing = {}
    for folder in (data, data / benchmark.folder):
        missing[folder] = _missing(benchmark, folder)
        if not missing[folder]:
            return folder
    folder = min(missing, key=lambda place: len(missing[place]))
    raise BenchmarkError(f"{benchmark.title} needs in {folder}, or in a folder {benchmark.folder} there:{_listed(missing[folder])}")


def split_in(benchmark: Benchmark, folder: Path) -> Benchmark:
    """The benchmark as the split that its folder holds: without `score` where only a server knows the answers, without `upload` where no
    server takes them.

    Raises BenchmarkError, naming every file that this split lacks.
    """
    if benchmark.split is None:
        return benchmark
    found = benchmark.split(benchmark, folder)
    missing = _missing(found, folder)
    if missing:
        raise BenchmarkError(f"{found.title} needs in {folder}:{_listed(missing)}")
    return found


def _missing(benchmark: Benchmark, folder: Path) -> dict[str, str]:
    """Of its files."""
    return {name: purpose for name, purpose in benchmark.files.items() if not any(path.exists() for path in _choices(folder, name))}


def _listed(files: Mapping[str, str]) -> str:
    return "".join(f"\n  {name.replace(' | ', ' or ')}: {purpose}" for name, purpose in files.items())


def find_file(folder: Path, name: str) -> Path:
    """The first of "a | b" that is there. Raises BenchmarkError if none is."""
    found = next((path for path in _choices(folder, name) if path.exists()), None)
    if found is None:
        raise BenchmarkError(f"{folder} has no {name.replace(' | ', ' and no ')}")
    return found


def _choices(folder: Path, name: str) -> list[Path]:
    return [folder / choice for choice in name.split(" | ")]


def read_json(file: Path) -> Any:
    """Raises BenchmarkError if the file is no JSON."""
    try:
        return json.loads(file.read_text(encoding=ENCODING))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchmarkError(f"{file} is not JSON: {error}") from error


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Raises BenchmarkError, naming the line, if one is no JSON object."""
    records = []
    try:
        lines = file.read_text(encoding=ENCODING).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchmarkError(f"line {number} of {file} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BenchmarkError(f"line {number} of {file} must be an object, but is {str(record)[:60]}")
        records.append(record)
    return records


def take(record: Mapping[str, Any], key: str, where: str) -> Any:
    """Raises BenchmarkError if a record lacks a key, or is no record."""
    if not isinstance(record, Mapping):
        raise BenchmarkError(f"{where} must be an object, but is {str(record)[:60]}")
    if key not in record:
        raise BenchmarkError(f"{where} has no {key!r}, but {', '.join(map(repr, record)) or 'is empty'}")
    return record[key]


def take_list(record: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """Raises BenchmarkError if a record has no list there."""
    value = take(record, key, where)
    if not isinstance(value, list):
        raise BenchmarkError(f"{where} must have a list of {key!r}, but has {str(value)[:60]}")
    return value


def llava_questions(file: Path, images: Path) -> list[Question]:
    """Questions in LLaVA's form: JSON lines of question_id, image, text, category."""
    questions = []
    for number, record in enumerate(read_json_lines(file), start=1):
        where = f"record {number} of {file}"
        image = record.get("image")
        extra = {key: value for key, value in record.items() if key not in ("question_id", "text", "image")}
        identity, text = str(take(record, "question_id", where)), take(record, "text", where)
        questions.append(Question(identity, text, (images / image,) if image else (), extra))
    return questions


def pair(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], file: Path) -> tuple[list[str | None], list[str]]:
    """(what was given to each question, None for nothing; ids of answers to no question).

    An answer is a record with `question_id` and `text` (or `answer`, `prediction`); where an id has several questions, its `prompt` says
    which. Raises BenchmarkError for a question that was answered twice, differently, if the prompt is needed and missing, or for a text or
    prompt that is no string.
    """
    by_id: dict[str, list[Question]] = {}
    for question in questions:
        by_id.setdefault(question.id, []).append(question)
    given: dict[tuple[str, str], str] = {}
    unknown = []
    for number, answer in enumerate(answers, start=1):
        where = f"answer {number} of {file}"
        identity = answer_id(answer)
        key = next((key for key in ("text", "answer", "prediction") if key in answer), None)
        if key is None:
            raise BenchmarkError(f"{where} has none of 'text', 'answer', 'prediction', but {', '.join(map(repr, answer)) or 'is empty'}")
        text, prompt = answer[key], answer.get("prompt")
        for name, value in ((key, text), ("prompt", "" if prompt is None else prompt)):
            if not isinstance(value, str):
                raise BenchmarkError(f"{where} has {json.dumps(value)[:40]} as {name!r}, but must have a string")
        choices = by_id.get(identity, [])
        if len(choices) > 1:
            if prompt is None:
                raise BenchmarkError(
                    f"{where} has question_id {identity!r}, as {len(choices)} questions have, and no 'prompt' to tell which"
                )
            choices = [question for question in choices if plain(question.prompt) == plain(prompt)]
        if not choices:
            unknown.append(identity)
            continue
        first = given.setdefault((identity, choices[0].prompt), text)
        if first != text:
            raise BenchmarkError(f"{where} answers question {identity!r} once more, with {text[:40]!r} after {first[:40]!r}")
    return [given.get((question.id, question.prompt)) for question in questions], unknown


def answer_id(answer: Mapping[str, Any]) -> str:
    """Of the question that it answers."""
    return str(answer.get("question_id", answer.get("questionId")))


def plain(prompt: str) -> str:
    """A prompt without image placeholders and white space at its ends, by which it is known again."""
    return " ".join(prompt.replace("<image>", " ").split())


def result(benchmark: Benchmark, scored: Scored, questions: Sequence[Question], given: Sequence[str | None]) -> dict[str, Any]:
    """What `moe-llava score --json` prints: scores with 95% intervals, questions without an answer, by id. There is no score of a group of
    which nothing was asked."""
    measured = scored.measure(scored.columns, np.ones(len(scored.items)))
    values = {name: value for name, value in measured.items() if not math.isnan(value)}

    def resampled(weights: np.ndarray) -> dict[str, float]:
        found = scored.measure(scored.columns, weights)
        return {name: found[name] for name in values}

    intervals = bootstrap(resampled, scored.units, scored.strata)
    same = {name for name in values if name.endswith(LENIENT) and values[name] == values[name.removesuffix(LENIENT)]}
    return {
        "benchmark": benchmark.name,
        "scores": {name: value for name, value in values.items() if name not in same},
        "intervals": {name: interval for name, interval in intervals.items() if name not in same},
        "questions": len(questions),
        "missing": [question.id for question, text in zip(questions, given, strict=True) if text is None],
    }


LENIENT = " (lenient)"


def total(values: np.ndarray) -> float:
    """Summed from first to last, as the published scripts do: the last digit depends on it."""
    return float(np.cumsum(values)[-1]) if len(values) else 0.0


def ratio(part: float, whole: float) -> float:
    """0 of nothing is 0: the precision of answers that never say yes, as published."""
    return part / whole if whole else 0.0


def share(part: float, whole: float) -> float:
    """NaN of nothing: what is right of questions that nobody asked is not 0."""
    return part / whole if whole else math.nan
