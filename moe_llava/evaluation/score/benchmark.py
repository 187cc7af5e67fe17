"""What a benchmark is: where its questions are, how answers to them are scored, what an upload looks like. Each has a file of its own in
benchmarks/, with one `BENCHMARK`.

Answers are paired with questions by id, never by order. A question without an answer is named, and counts as wrong.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from moe_llava.common.messages import did_you_mean
from moe_llava.evaluation.score.reading import BenchmarkError, once, read_json, read_json_lines, take, take_list, take_text
from moe_llava.evaluation.score.statistics import bootstrap

if TYPE_CHECKING:
    from moe_llava.evaluation.score.judge import Judge

# What a benchmark's file needs of reading.py can be imported from here, too.
__all__ = ["BenchmarkError", "read_json", "read_json_lines", "take", "take_list", "take_text"]

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

# What language models end a turn with. A client that does not remove them leaves them in its answers.
END_TOKENS = (
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
    "<|end|>",
    "<|eot|>",
)

Columns = Mapping[str, np.ndarray]


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
    `check`: raises BenchmarkError for what `judge` and `upload` would find wrong with the files, given the questions to ask.
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
    check: Callable[[Path, list[Question]], object] | None = None
    headline: tuple[str, ...] = ()
    split: Callable[[Benchmark, Path], Benchmark] | None = None


def find_benchmark(name: str) -> Benchmark:
    """Raises BenchmarkError if there is none of this name."""
    if name not in NAMES:
        raise BenchmarkError(f"no benchmark is called {name!r}{did_you_mean(name.lower(), NAMES, '.')} There are {', '.join(NAMES)}")
    module = importlib.import_module(f"moe_llava.evaluation.score.definitions.{NAMES[name]}")
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


def check_truth(benchmark: Benchmark, folder: Path, asked: list[Question]) -> None:
    """Score the questions as if none had been answered, so that what is wrong with the ground truth is reported before they are asked."""
    if benchmark.score is not None:
        benchmark.score(folder, asked, [None] * len(asked))
    if benchmark.check is not None:
        benchmark.check(folder, asked)


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


def first_image(question: Question, where: str) -> Path | InlineImage:
    """Raise BenchmarkError if a question has no image."""
    if not question.images:
        raise BenchmarkError(f"{where} has no image, but must have one")
    return question.images[0]


def llava_questions(file: Path, images: Path, unique: tuple[str, ...] = ("question_id",)) -> list[Question]:
    """Read questions in LLaVA's form: JSON lines of question_id, image, text, category. `unique`: the keys that no two records may have in
    common.

    Raise BenchmarkError, naming the record, if they do, or if a value is missing or of another type.
    """
    questions = []
    seen: dict[Any, str] = {}
    for number, record in enumerate(read_json_lines(file), start=1):
        where = f"record {number} of {file}"
        image = take_text(record, "image", where) if record.get("image") is not None else ""
        extra = {key: value for key, value in record.items() if key not in ("question_id", "text", "image")}
        identity, text = str(take(record, "question_id", where)), take_text(record, "text", where)
        if unique:
            once(seen, " and ".join(unique), ", ".join(str(record[key]) for key in unique), where)
        questions.append(Question(identity, text, (images / image,) if image else (), extra))
    return questions


def pair(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], file: Path) -> tuple[list[str | None], list[str]]:
    """(what was given to each question, None for nothing; ids of answers to no question).

    An answer is a record with `question_id` and `text` (or `answer`, `prediction`); where an id has several questions, its `prompt` says
    which. Raises BenchmarkError for a question that was answered twice, if the prompt is needed and missing, if it is not clear which of a
    record's keys is the answer, or for a text or prompt that is no string.
    """
    asked: dict[str, list[Question]] = {}
    for question in questions:
        asked.setdefault(question.id, []).append(question)
    given: dict[tuple[str, str], str] = {}
    seen: dict[Any, str] = {}
    unknown = []
    for number, answer in enumerate(answers, start=1):
        where = f"answer {number} of {file}"
        identity, text, prompt = _checked_answer(answer, where)
        choices = asked.get(identity, [])
        if len(choices) > 1:
            if prompt is None:
                raise BenchmarkError(
                    f"{where} has question_id {identity!r}, as {len(choices)} questions have, and no 'prompt' to tell which"
                )
            choices = [question for question in choices if plain(question.prompt) == plain(prompt)]
        if not choices:
            unknown.append(identity)
            continue
        key = (identity, choices[0].prompt)
        if key in given:
            before = f"with {given[key][:40]!r} before" if given[key] != text else "with the same text"
            raise BenchmarkError(f"{where} answers question {identity!r} once more, with {text[:40]!r}; {seen[key]} answers it {before}")
        given[key], seen[key] = text, where
    return [given.get((question.id, question.prompt)) for question in questions], unknown


def _checked_answer(answer: Mapping[str, Any], where: str) -> tuple[str, str, str | None]:
    """(id, text, prompt) of an answer."""
    values = {key: answer[key] for key in ("text", "answer", "prediction") if key in answer}
    if not values:
        raise BenchmarkError(f"{where} has none of 'text', 'answer', 'prediction', but {', '.join(map(repr, answer)) or 'is empty'}")
    if not {"question_id", "questionId"} & answer.keys():
        raise BenchmarkError(f"{where} has no 'question_id', but {', '.join(map(repr, answer))}")
    prompt = answer.get("prompt")
    for name, value in (*values.items(), ("prompt", "" if prompt is None else prompt)):
        if not isinstance(value, str):
            raise BenchmarkError(f"{where} has {json.dumps(value)[:40]} as {name!r}, but must have a string")
    if len(set(values.values())) > 1:
        # One may be the ground truth, which would make every answer right.
        raise BenchmarkError(f"{where} has {' and '.join(map(repr, values))}, which differ: keep only the model's answer")
    return answer_id(answer), next(iter(values.values())), prompt


def answer_id(answer: Mapping[str, Any]) -> str:
    """Of the question that it answers."""
    return str(answer.get("question_id", answer.get("questionId")))


def plain(prompt: str) -> str:
    """A prompt without image placeholders and white space at its ends, by which it is known again."""
    return " ".join(prompt.replace("<image>", " ").split())


def result(benchmark: Benchmark, scored: Scored, questions: Sequence[Question], given: Sequence[str | None]) -> dict[str, Any]:
    """What `moe-llava score --json` prints: scores with 95% intervals, questions without an answer, by id, and how many answers end with
    an end-of-turn token. There is no score of a group of which nothing was asked."""
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
        "end_tokens": end_tokens(given),
    }


def end_tokens(given: Sequence[str | None]) -> dict[str, int]:
    """End-of-turn token -> how many answers end with it. Scores count them as written, so they make right answers wrong."""
    endings = (next((token for token in END_TOKENS if text.rstrip().endswith(token)), None) for text in given if text is not None)
    return dict(Counter(token for token in endings if token is not None))


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
