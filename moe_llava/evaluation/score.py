"""From an answer file to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_llava.evaluation.benchmark import Benchmark, BenchmarkError, Question, find_benchmark, find_folder, pair, read_json_lines, result
from moe_llava.evaluation.judge import Judge


def score_answers(name: str, data: Path, answers: Path) -> dict[str, Any]:
    """`benchmark`, `scores`, `intervals`, `questions`, `missing` (ids without an answer), `unknown` (ids of answers to no question), and
    `model` if the answers name one (`model_id`).

    Raises BenchmarkError if files are missing or damaged, or if only a server or a judge can score the benchmark.
    """
    benchmark = find_benchmark(name)
    if benchmark.judge is not None and benchmark.score is None:
        raise BenchmarkError(f"{benchmark.title} is scored by a language model as judge: {judge_command(benchmark, data, answers)}")
    folder = find_folder(benchmark, data)
    if benchmark.score is None:
        raise BenchmarkError(f"{benchmark.title} cannot be scored here: its truth is not public")
    questions, given, rest = _paired(benchmark, folder, answers)
    return result(benchmark, benchmark.score(folder, questions, given), questions, given) | rest


def judge_answers(
    name: str, data: Path, answers: Path, endpoint: str, model: str, prices: tuple[float, float] | None = None
) -> dict[str, Any]:
    """What `score_answers` gives, `judge` (who judged, at what cost; see Judge.summary) and `unreadable`, ids whose judgement could not be
    read. The judge's replies are kept beside the answers.

    Raises BenchmarkError as `score_answers` does, or if no judge is needed; JudgeError if there is trouble with the judge.
    """
    benchmark = find_benchmark(name)
    if benchmark.judge is None:
        raise BenchmarkError(f"{benchmark.title} needs no judge: moe-llava score {name} --data {data} --answers {answers}")
    folder = find_folder(benchmark, data)
    questions, given, rest = _paired(benchmark, folder, answers)
    judge = Judge(endpoint, model, answers.with_name(f"{answers.stem}.judged.jsonl"))
    scored = benchmark.judge(folder, questions, given, judge)
    return result(benchmark, scored, questions, given) | {
        **rest,
        "judge": judge.summary(prices),
        "unreadable": [item["id"] for item in scored.items if item["given"] is not None and item["read"] is None],
    }


def judge_command(benchmark: Benchmark, data: Path, answers: Path) -> str:
    """What to type to have answers judged."""
    return f"moe-llava judge {benchmark.name} --data {data} --answers {answers} --endpoint URL --judge-model NAME"


def _paired(benchmark: Benchmark, folder: Path, file: Path) -> tuple[list[Question], list[str | None], dict[str, Any]]:
    """Questions, what was given to each, and what the answers tell besides."""
    questions, answers = benchmark.questions(folder), read_json_lines(file)
    given, unknown = pair(questions, answers, file)
    models = {str(answer["model_id"]) for answer in answers if answer.get("model_id")}
    return questions, given, {"unknown": unknown} | ({"model": models.pop()} if len(models) == 1 else {})
