"""The interface of a benchmark: where its questions are, how answers are scored, what its server takes. Each benchmark is a file in
definitions/ with one `BENCHMARK`.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_llava.common.messages import did_you_mean
from moe_llava.evaluation.score.questions import Answers, Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.statistics import bootstrap

if TYPE_CHECKING:
    from moe_llava.evaluation.score.judge import Judge

# Name -> module in definitions/, where the two differ.
_MODULES = {"digits": "digits_world", "questions": "own_questions"}
NAMES = (
    *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench-cn", "seed-bench"),
    *("llava-bench", "mm-vet", "mmmu", "digits", "digits-options", "questions"),
)

LENIENT = " (lenient)"

# What language models end a turn with. Answers of some clients still contain it.
END_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "<|end|>", "<|eot|>")

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Scored:
    """The scored answers, item by item, N items in all.

    `items` are for people: id, answer ("given"), how it was read, ground truth ("expected"), right. `columns` are numbers [N] each. `units`
    names for each item what the bootstrap draws together. `measure` maps the columns and the weight [N] of each item to scores, in the
    benchmark's own unit; NaN for an empty group. A score named "x (lenient)" is x by a more forgiving reading of the answers, and is
    reported where it differs. `strata` names for each item the group whose number of units the bootstrap keeps, where a score is a sum over
    such groups. `counts`: score -> the number of its items, where scores are of groups.
    """

    items: list[dict[str, Any]]
    columns: Columns
    units: list[str]
    measure: Callable[[Columns, np.ndarray], dict[str, float]]
    strata: list[str] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Settings for a user's own questions; None stands for the default. `images`: the folder of their images. `metric`: see metrics.py.
    `group_by`: a key of the records whose values have scores of their own."""

    images: Path | None = None
    metric: str | None = None
    group_by: str | None = None


NO_OPTIONS = Options()


@dataclass(frozen=True)
class Benchmark:
    """`folder`: its name in LLaVA's evaluation folder; empty for a user's own file, which takes the place of the folder. `files`: path ->
    purpose of each file needed there; of "a | b" one is enough. `questions`: read them from the folder. `headline`: the scores to show in a
    table.

    `score`: from folder, questions and answers; None if only a server or a judge can score.
    `judge`: the same, by the opinion of a language model; items have "read", which is None if the opinion could not be read.
    `upload`: write what the benchmark's server takes into the last argument, and return the files.
    `check`: raise BenchmarkError for whatever `judge` and `upload` would find wrong with the files.
    `split`: see `split_in`. `configure`: return the benchmark with options; None if it has none. `about`: what its results state beside
    the scores. `unit`: of the scores where people read them; `shown`: what stored scores are multiplied by for that."""

    name: str
    title: str
    folder: str
    files: dict[str, str]
    questions: Callable[[Path], list[Question]]
    score: Callable[[Path, list[Question], Answers], Scored] | None = None
    upload: Callable[[Path, list[Question], Answers, Path], list[Path]] | None = None
    max_new_tokens: int = 128
    judge: Callable[[Path, list[Question], Answers, Judge], Scored] | None = None
    check: Callable[[Path, list[Question]], object] | None = None
    headline: tuple[str, ...] = ("accuracy",)
    split: Callable[[Benchmark, Path], Benchmark] | None = None
    configure: Callable[[Benchmark, Options], Benchmark] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "%"
    shown: int = 1


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name. Raises BenchmarkError if there is none."""
    if name not in NAMES:
        raise BenchmarkError(f"no benchmark is called {name!r}{did_you_mean(name.lower(), NAMES, '.')} There are {', '.join(NAMES)}")
    module = _MODULES.get(name, name.replace("-", "_"))
    return importlib.import_module(f"moe_llava.evaluation.score.definitions.{module}").BENCHMARK


def configured(benchmark: Benchmark, options: Options) -> Benchmark:
    """Return the benchmark with options. Raises BenchmarkError if it has none, or for a wrong one."""
    if benchmark.configure is not None:
        return benchmark.configure(benchmark, options)
    given = [f"--{name.replace('_', '-')}" for name, value in asdict(options).items() if value is not None]
    if given:
        raise BenchmarkError(f"{' and '.join(given)} may be given for the benchmark questions only, but not for {benchmark.name}")
    return benchmark


def find_folder(benchmark: Benchmark, data: Path) -> Path:
    """Return the benchmark's own folder: `data`, or the one inside it with the name from LLaVA's evaluation.

    Raises BenchmarkError, naming every missing file.
    """
    if not benchmark.folder:
        return data
    missing = {folder: _missing(benchmark, folder) for folder in (data, data / benchmark.folder)}
    folder = min(missing, key=lambda each: len(missing[each]))
    if missing[folder]:
        raise BenchmarkError(f"{benchmark.title} needs in {folder}, or in a folder {benchmark.folder} there:{missing[folder]}")
    return folder


def split_in(benchmark: Benchmark, folder: Path) -> Benchmark:
    """Return the benchmark for the split that the folder holds: without `score` if only a server knows the answers, without `upload` if no
    server takes them.

    Raises BenchmarkError, naming every file that this split lacks.
    """
    if benchmark.split is None:
        return benchmark
    found = benchmark.split(benchmark, folder)
    if missing := _missing(found, folder):
        raise BenchmarkError(f"{found.title} needs in {folder}:{missing}")
    return found


def check_truth(benchmark: Benchmark, folder: Path, questions: list[Question]) -> None:
    """Score the questions as if there were no answers, so that errors in the ground truth are reported before the model is queried."""
    if benchmark.score is not None:
        benchmark.score(folder, questions, [None] * len(questions))
    if benchmark.check is not None:
        benchmark.check(folder, questions)


def find_file(folder: Path, name: str) -> Path:
    """Return the first existing file of "a | b". Raises BenchmarkError if there is none."""
    found = next((path for path in _choices(folder, name) if path.exists()), None)
    if found is None:
        raise BenchmarkError(f"{folder} has no {name.replace(' | ', ' and no ')}")
    return found


def _choices(folder: Path, name: str) -> list[Path]:
    return [folder / choice for choice in name.split(" | ")]


def _missing(benchmark: Benchmark, folder: Path) -> str:
    """Return a line for each file that the benchmark misses in a folder."""
    missing = [name for name in benchmark.files if not any(path.exists() for path in _choices(folder, name))]
    return "".join(f"\n  {name.replace(' | ', ' or ')}: {benchmark.files[name]}" for name in missing)


def upload_each(name: str, record: Callable[[Question, str], Any]) -> Callable[[Path, list[Question], Answers, Path], list[Path]]:
    """Return a function for `Benchmark.upload` that writes a JSON list with a record of each question and its answer, "" if it has none."""

    def upload(folder: Path, questions: list[Question], answers: Answers, out: Path) -> list[Path]:
        records = [record(question, text or "") for question, text in zip(questions, answers, strict=True)]
        return write_json(out / name, records)

    return upload


def write_json(file: Path, content: Any) -> list[Path]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return [file]


def result(benchmark: Benchmark, scored: Scored, questions: Sequence[Question], answers: Sequence[str | None]) -> dict[str, Any]:
    """Return what `moe-llava score --json` prints: scores with 95% intervals, ids of questions without an answer, and how many answers end
    with an end-of-turn token. Empty groups have no score."""
    measured = scored.measure(scored.columns, np.ones(len(scored.items)))
    values = {name: value for name, value in measured.items() if not math.isnan(value)}

    def resampled(weights: np.ndarray) -> dict[str, float]:
        found = scored.measure(scored.columns, weights)
        return {name: found[name] for name in values}

    intervals = bootstrap(resampled, scored.units, scored.strata)
    same = {name for name in values if name.endswith(LENIENT) and values[name] == values[name.removesuffix(LENIENT)]}
    return {
        "benchmark": benchmark.name,
        **benchmark.about,
        "scores": {name: value for name, value in values.items() if name not in same},
        "intervals": {name: interval for name, interval in intervals.items() if name not in same},
        **({"counts": {name: scored.counts[name] for name in values if name in scored.counts}} if scored.counts else {}),
        "questions": len(questions),
        "missing": [question.id for question, text in zip(questions, answers, strict=True) if text is None],
        "end_tokens": count_end_tokens(answers),
    }


def count_end_tokens(answers: Sequence[str | None]) -> dict[str, int]:
    """Return end-of-turn token -> how many answers end with it. Scores count it as part of the answer, so right answers become wrong."""
    endings = (next((token for token in END_TOKENS if text.rstrip().endswith(token)), None) for text in answers if text is not None)
    return dict(Counter(token for token in endings if token is not None))


def total(values: np.ndarray) -> float:
    """Sum from first to last, as the published scripts do: the last digit depends on the order."""
    return float(np.cumsum(values)[-1]) if len(values) else 0.0


def ratio(part: float, whole: float) -> float:
    """Return part / whole, and 0 for an empty whole: the published precision of answers that never say yes."""
    return part / whole if whole else 0.0


def share(part: float, whole: float) -> float:
    """Return part / whole, and NaN for an empty whole: the accuracy of no questions is not 0."""
    return part / whole if whole else math.nan
