"""From an answer file to scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import NO_OPTIONS, Benchmark, Options, configured, find_benchmark, find_folder, result, split_in
from moe_llava.evaluation.score.judge import Judge
from moe_llava.evaluation.score.questions import Question, answer_id, pair, plain
from moe_llava.evaluation.score.reading import BenchmarkError, read_json_lines


def score_answers(name: str, data: Path, answers: Path, options: Options = NO_OPTIONS) -> dict[str, Any]:
    """Return `benchmark`, `scores`, `intervals`, `questions`, `missing` (ids without an answer), `end_tokens` (how many answers end with
    one), `unknown` (ids of answers to unknown questions), and `model` if the answers name one (`model_id`).

    Raises BenchmarkError if files are missing or damaged, if the answers belong to other questions, or if only a server or a judge can
    score the benchmark.
    """
    benchmark = configured(find_benchmark(name), options)
    if benchmark.judge is not None and benchmark.score is None:
        raise BenchmarkError(f"{benchmark.title} is scored by a language model as judge: {judge_command(benchmark, data, answers)}")
    folder = find_folder(benchmark, data)
    benchmark = split_in(benchmark, folder)
    if benchmark.score is None:
        raise BenchmarkError(f"{benchmark.title}, as {folder} has it, is scored by a server only: the answers are not public")
    questions, given, rest = _paired(benchmark, folder, answers)
    return result(benchmark, benchmark.score(folder, questions, given), questions, given) | rest


def judge_answers(
    name: str, data: Path, answers: Path, endpoint: str, model: str, prices: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Return the values of `score_answers`, `judge` (see Judge.summary), and `unreadable`: the ids whose judgement could not be read. The
    judge's replies are saved beside the answers.

    Raises BenchmarkError as `score_answers` does, or if no judge is needed; JudgeError if the judge fails.
    """
    if prices is not None and not all(math.isfinite(price) and price >= 0 for price in prices):
        raise BenchmarkError(f"--prices is {prices[0]:g} {prices[1]:g}, but must be two numbers from 0")
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
    """Return the command that judges answers."""
    return f"moe-llava judge {benchmark.name} --data {data} --answers {answers} --endpoint URL --judge-model NAME"


def _paired(benchmark: Benchmark, folder: Path, file: Path) -> tuple[list[Question], list[str | None], dict[str, Any]]:
    """Return the questions, the answer to each, and `unknown` and `model` as in `score_answers`."""
    questions, answers = benchmark.questions(folder), read_json_lines(file)
    given, unknown = pair(questions, answers, file)
    _check_answers(questions, answers, given, file)
    models = {str(answer["model_id"]) for answer in answers if answer.get("model_id")}
    return questions, given, {"unknown": unknown} | ({"model": models.pop()} if len(models) == 1 else {})


def _check_answers(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], given: Sequence[str | None], file: Path) -> None:
    """Raise BenchmarkError if no answer belongs to one of the questions, by its id, and by its prompt if it has one."""
    prompts: dict[str, list[str]] = {}
    for question in questions:
        prompts.setdefault(question.id, []).append(plain(question.prompt))
    if not answers:
        raise BenchmarkError(f"{file} has no answers")
    known = [answer for answer in answers if answer_id(answer) in prompts]
    if not known:
        raise BenchmarkError(f"{file} answers the questions {_some(map(answer_id, answers))}; those to answer are {_some(prompts)}")
    with_prompt = [(answer_id(answer), plain(answer["prompt"])) for answer in known if answer.get("prompt") is not None]
    # One within the other is enough: LLaVA saves some prompts without the instruction how to answer.
    alike = any(prompt in text or text in prompt for identity, prompt in with_prompt for text in prompts[identity])
    if with_prompt and not (alike and any(text is not None for text in given)):
        identity, prompt = with_prompt[0]
        raise BenchmarkError(f"{file} answers other questions: {identity} was {prompt[:90]!r} there, but is {prompts[identity][0][:90]!r}")


def _some(ids: Iterable[str]) -> str:
    first = list(islice(ids, 4))
    return ", ".join(first[:3]) + (" and so on" if len(first) > 3 else "")
