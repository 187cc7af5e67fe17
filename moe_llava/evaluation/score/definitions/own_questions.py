"""A user's own questions, such as those that were held out when a model was fine-tuned: conversations in LLaVA's format. The last answer
of each is the expected one, and all before it is the prompt.

Scores are in percent. `accuracy` is the mean of the points that a metric gives (see metrics.py), and `<key>/<value>` the same over a group.
Questions whose answer is yes or no are also scored as POPE does, but that precision has no value if no answer is yes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.data.records import Record
from moe_llava.evaluation.score.benchmark import NO_OPTIONS, Benchmark, Columns, Options, Scored
from moe_llava.evaluation.score.means import mean_by_group, yes_or_no
from moe_llava.evaluation.score.metrics import METRICS, find_metric
from moe_llava.evaluation.score.questions import Answers, Question, conversation_questions
from moe_llava.evaluation.score.reading import BenchmarkError

DEFAULT = "exact"
YES_NO = "yes_no"


def questions(options: Options, file: Path) -> list[Question]:
    return conversation_questions(file, options.images or (file if file.is_dir() else file.parent), partial(_extra, options))


def _extra(options: Options, record: Record, question: Question) -> dict[str, Any]:
    """Return the metric, the group, and what the metric reads in the expected answer. Raises BenchmarkError if it reads nothing there."""
    own = record.extra.get("metric")
    name = find_metric(options.metric or DEFAULT if own is None else own, f"the metric of {record.source}")
    expected = METRICS[name].read(question.extra["answer"], question.prompt)
    if expected is None:
        raise BenchmarkError(
            f"{record.source} has the answer {question.extra['answer']!r}, but the metric {name} needs {METRICS[name].rule}"
        )
    group = None if options.group_by is None else f"{options.group_by}/{record.group(options.group_by)}"
    return {"metric": name, "expected": expected, "group": group}


def score(file: Path, questions: list[Question], answers: Answers) -> Scored:
    items = [_item(question, text) for question, text in zip(questions, answers, strict=True)]
    groups = [["accuracy", *([item["group"]] if item["group"] else [])] for item in items]
    scored = mean_by_group(items, groups, [question.unit for question in questions])
    asked = np.array([item["metric"] == YES_NO for item in items], dtype=bool)
    if not asked.any():
        return scored
    truth = np.array([item["metric"] == YES_NO and item["expected"] for item in items], dtype=bool)
    # An answer that says neither counts as the wrong one, and so does a missing one.
    read = [item["read"] if isinstance(item["read"], bool) else not yes for item, yes in zip(items, truth, strict=True)]
    marks = {"asked": asked, "truth": truth, "predicted": np.array(read, dtype=bool)}

    def measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
        found = yes_or_no(weights * columns["asked"], columns["predicted"], columns["truth"])
        share = found.pop("yes")
        found |= {"yes_share": share} | ({} if share else {"precision": math.nan})
        return scored.measure(columns, weights) | {f"{YES_NO}/{name}": 100 * value for name, value in found.items()}

    counts = dict(scored.counts) | {f"{YES_NO}/accuracy": int(asked.sum())}
    return replace(scored, columns={**scored.columns, **marks}, measure=measure, counts=counts)


def _item(question: Question, text: str | None) -> dict[str, Any]:
    metric, expected = METRICS[question.extra["metric"]], question.extra["expected"]
    read = None if text is None else metric.read(text, question.prompt)
    item = {"id": question.id, "metric": question.extra["metric"], "group": question.extra["group"], "given": text, "read": read}
    return item | {"expected": expected, "right": 0.0 if read is None else metric.points(read, expected)}


def configure(benchmark: Benchmark, options: Options) -> Benchmark:
    about = {"metric": find_metric(options.metric or DEFAULT, "--metric"), "group_by": options.group_by}
    return replace(benchmark, questions=partial(questions, options), about=about)


def split(benchmark: Benchmark, file: Path) -> Benchmark:
    """Return the benchmark with the name of the file in its messages and results."""
    return replace(benchmark, title=file.name, about={"data": file.name, **benchmark.about})


BENCHMARK = configure(
    Benchmark(
        name="questions",
        title="Your own questions",
        folder="",
        files={},
        questions=partial(questions, NO_OPTIONS),
        score=score,
        split=split,
        configure=configure,
    ),
    NO_OPTIONS,
)
