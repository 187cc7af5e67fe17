"""Scores that are means over items: over all of them, and by group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import LENIENT, Columns, Scored, ratio, share, total


def mean_by(items: list[dict[str, Any]], kinds: Sequence[str], units: list[str]) -> Scored:
    """Score `accuracy`, the mean of the items' `right` (0 to 1), in percent, and `<kind>/<value>`, the mean of the items with this value.
    If items have `leniently`, score `accuracy (lenient)` too."""
    columns: dict[str, np.ndarray] = {"right": np.array([item["right"] for item in items], dtype=float)}
    if all("leniently" in item for item in items):
        columns["leniently"] = np.array([item["leniently"] for item in items], dtype=float)
    values: dict[str, np.ndarray] = {}
    for kind in kinds:
        # Values become numbers once, not in each of the bootstrap's resamples.
        values[kind], columns[kind] = np.unique(np.array([item[kind] for item in items]), return_inverse=True)
    return Scored(items, columns, units, partial(_measure_kinds, values))


def _measure_kinds(values: dict[str, np.ndarray], columns: Columns, weights: np.ndarray) -> dict[str, float]:
    scores = {}
    for name, column in (("accuracy", "right"), (f"accuracy{LENIENT}", "leniently")):
        if column in columns:
            scores[name] = 100 * share(total(weights * columns[column]), total(weights))
    for kind, names in values.items():
        points = np.bincount(columns[kind], weights * columns["right"], minlength=len(names))
        counts = np.bincount(columns[kind], weights, minlength=len(names))
        scores |= {f"{kind}/{name}": 100 * share(float(a), float(b)) for name, a, b in zip(names, points, counts, strict=True)}
    return scores


def mean_by_group(items: list[dict[str, Any]], groups: Sequence[Sequence[str]], units: list[str]) -> Scored:
    """Score the mean of `right` (0 to 1), and of `right (lenient)` if items have it, over each group, in percent. `groups`: for each item,
    the names of the groups it belongs to; a name with a slash is part of a whole."""
    names = sorted({name for group in groups for name in group}, key=lambda name: ("/" in name, name))
    suffixes = ("", LENIENT) if all(f"right{LENIENT}" in item for item in items) else ("",)
    columns = {suffix: np.array([item[f"right{suffix}"] for item in items], dtype=float) for suffix in suffixes}
    columns |= {name: np.array([name in group for group in groups], dtype=float) for name in names}
    counts = Counter(f"{name}{suffix}" for group in groups for name in set(group) for suffix in suffixes)
    return Scored(items, columns, units, partial(_measure_groups, names, suffixes), counts=counts)


def _measure_groups(names: Sequence[str], suffixes: Sequence[str], columns: Columns, weights: np.ndarray) -> dict[str, float]:
    hits = {suffix: weights * columns[suffix] for suffix in suffixes}
    counts = {name: float(weights @ columns[name]) for name in names}
    return {f"{name}{suffix}": share(float(hits[suffix] @ columns[name]), counts[name]) * 100 for suffix in suffixes for name in names}


def yes_or_no(weights: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return accuracy, precision, recall, F1 and the share of yes, as fractions, of predictions and ground truth, [N] each.

    As published, precision is 0 if nothing was predicted. Recall and F1 are NaN if nothing is true, and all are NaN without questions.
    """
    hits, alarms = float(weights[predicted & truth].sum()), float(weights[predicted & ~truth].sum())
    precision = ratio(hits, hits + alarms) if weights.any() else math.nan
    recall = share(hits, float(weights[truth].sum()))
    number = float(weights.sum())
    return {
        "accuracy": share(float(weights[predicted == truth].sum()), number),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes": share(float(weights[predicted].sum()), number),
    }
