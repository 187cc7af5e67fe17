"""From an answer file to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_llava.evaluation.benchmark import BenchmarkError, find_benchmark, find_folder, pair, read_json_lines, result


def score_answers(name: str, data: Path, answers: Path) -> dict[str, Any]:
    """`benchmark`, `scores`, `intervals`, `questions`, `missing` (ids without an answer), `unknown` (ids of answers to no question).

    Raises BenchmarkError if files are missing or damaged, or if only a server or a judge can score the benchmark.
    """
    benchmark = find_benchmark(name)
    folder = find_folder(benchmark, data)
    if benchmark.score is None:
        raise BenchmarkError(f"{benchmark.title} cannot be scored here: its truth is not public")
    questions = benchmark.questions(folder)
    given, unknown = pair(questions, read_json_lines(answers), answers)
    return result(benchmark, benchmark.score(folder, questions, given), questions, given) | {"unknown": unknown}
