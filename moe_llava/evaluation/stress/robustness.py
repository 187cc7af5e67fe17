"""The cost of perturbations: the drop in accuracy on the same questions, with 95% intervals over the pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from moe_llava.common.colours import EXPERT_COLOURS
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.statistics import bootstrap_mean
from moe_llava.evaluation.stress.perturb import KINDS, STRENGTHS, Perturbation

Items = Sequence[Mapping[str, Any]]  # each with an id, and right: True or False, or a share of 1
MARKERS = "osD^v"


def robustness(clean: Items, perturbed: Mapping[Perturbation, Items], units: Sequence[str]) -> dict[str, Any]:
    """Return `clean`, the accuracy with low, high (95%) and n, and `drops`: for each name and strength the accuracy `right` and its `drop`
    below clean, with low and high.

    Args:
        clean: the items of the benchmark's Scored.
        perturbed: the items of the same questions under each perturbation.
        units: the units of the clean items, as in Scored.

    Raises BenchmarkError if the questions differ, or if an item has no accuracy.
    """
    right = _by_question(clean, "without perturbation")
    drops = []
    for perturbation, items in perturbed.items():
        then = _by_question(items, f"under {perturbation}")
        different = sorted(identity for identity, _ in right.keys() ^ then.keys())
        if different:
            named = f"{len(different)} in all: {', '.join(different[:5])}"
            raise BenchmarkError(f"questions were scored with or without {perturbation} only, {named}")
        interval = asdict(bootstrap_mean([value - then[key] for key, value in right.items()], list(units)))
        found = asdict(perturbation) | {"kind": perturbation.kind, "right": float(np.mean(list(then.values())))}
        drops.append(found | {"drop": interval["mean"], "low": interval["low"], "high": interval["high"], "n": interval["n"]})
    return {"clean": asdict(bootstrap_mean(list(right.values()), list(units))), "drops": drops}


def _by_question(items: Items, where: str) -> dict[tuple[str, int], float]:
    """Return (id, number of earlier items with it) -> right, in the order of the items."""
    seen: Counter[str] = Counter()
    found = {}
    for item in items:
        identity, right = str(item["id"]), item.get("right")
        if not isinstance(right, bool | int | float | np.bool_):
            raise BenchmarkError(f"question {identity} {where} has {right!r} as right, but must be right, wrong, or in between")
        found[identity, seen[identity]] = float(right)
        seen[identity] += 1
    if not found:
        raise BenchmarkError(f"no question was scored {where}")
    return found


def plot_robustness(summary: dict[str, Any], title: str = "") -> Figure:
    """Plot the drop against strength with intervals, a line per perturbation; visual, textual and adversarial ones side by side."""
    kinds = [kind for kind in dict.fromkeys(KINDS.values()) if any(drop["kind"] == kind for drop in summary["drops"])]
    number = max(1, len(kinds))
    figure, grid = plt.subplots(1, number, figsize=(4.4 * number, 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, kind in zip(grid[0], kinds, strict=False):
        names = [name for name in KINDS if KINDS[name] == kind]
        shown = [name for name in names if any(drop["name"] == name for drop in summary["drops"])]
        for name in shown:
            # A perturbation has one colour in all pictures. The shift keeps intervals from hiding one another.
            place, shift = names.index(name), 0.08 * (shown.index(name) - (len(shown) - 1) / 2)
            drops = sorted((drop for drop in summary["drops"] if drop["name"] == name), key=lambda drop: drop["strength"])
            strengths = [drop["strength"] + shift for drop in drops]
            middle, low, high = (np.array([100 * drop[key] for drop in drops]) for key in ("drop", "low", "high"))
            style = {"color": EXPERT_COLOURS[place], "marker": MARKERS[place], "markersize": 5, "capsize": 2, "linewidth": 1.5}
            axis.errorbar(strengths, middle, [middle - low, high - middle], label=name, elinewidth=1, **style)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(kind, loc="left")
        axis.set_xlabel("strength")
        axis.set_xticks(STRENGTHS)
        axis.set_xlim(0.6, 5.4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    clean = summary["clean"]
    grid[0][0].set_ylabel("drop in accuracy, percentage points")
    baseline = f"{clean['mean']:.1%} of {clean['n']:,} right without perturbation; bars: 95% intervals"
    figure.suptitle(f"{title + ': ' if title else ''}{baseline}", x=0.01, ha="left", fontsize=10)
    return figure
