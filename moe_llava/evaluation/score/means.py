"""Scores that are means over items, of all and by kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import LENIENT, Columns, Scored, ratio, share, total


def mean_by(items: list[dict[str, Any]], kinds: Sequence[str], units: list[str]) -> Scored:
    """`accuracy`: the mean of the items' `right` (0 to 1), in percent; `<kind>/<value>`: that of the items which have this value.
    If items have `leniently`, also `accuracy (lenient)`."""
    columns: dict[str, np.ndarray] = {"right": np.array([item["right"] for item in items], dtype=float)}
    if all("leniently" in item for item in items):
        columns["leniently"] = np.array([item["leniently"] for item in items], dtype=float)
    values: dict[str, np.ndarray] = {}
    for kind in kinds:
        # Values become numbers once, not in each of the bootstrap's resamples.
        values[kind], columns[kind] = np.unique(np.array([item[kind] for item in items]), return_inverse=True)
    return Scored(items, columns, units, partial(_measure, values))


def _measure(values: dict[str, np.ndarray], columns: Columns, weights: np.ndarray) -> dict[str, float]:
    scores = {}
    for name, column in (("accuracy", "right"), (f"accuracy{LENIENT}", "leniently")):
        if column in columns:
            scores[name] = 100 * share(total(weights * columns[column]), total(weights))
    for kind, names in values.items():
        points = np.bincount(columns[kind], weights * columns["right"], minlength=len(names))
        counts = np.bincount(columns[kind], weights, minlength=len(names))
        scores |= {f"{kind}/{name}": 100 * share(float(a), float(b)) for name, a, b in zip(names, points, counts, strict=True)}
    return scores


def detection(weights: np.ndarray, said: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """(precision, recall, F1), of what was said to be so and what is so, [N] each. Precision is 0 if nothing was said to be so, as
    published; NaN if nothing was asked. Recall and F1 are NaN where there is nothing to find."""
    hits, alarms = float(weights[said & truth].sum()), float(weights[said & ~truth].sum())
    precision = ratio(hits, hits + alarms) if weights.any() else math.nan
    recall = share(hits, float(weights[truth].sum()))
    return precision, recall, ratio(2 * precision * recall, precision + recall)
