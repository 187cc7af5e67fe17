"""Drops are over the same questions, paired by id."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from moe_llava.common.colours import EXPERT_COLOURS
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress.perturb import KINDS, STRENGTHS, Perturbation
from moe_llava.evaluation.stress.robustness import plot_robustness, robustness


def items(*right):
    return [{"id": str(number), "right": value} for number, value in enumerate(right)]


CLEAN = items(True, True, True, False)
UNITS = ["a", "b", "c", "d"]


def test_drops():
    worse, other = items(True, False, False, True), items(1.0, 1.0, 0.3, 0.0)
    found = robustness(CLEAN, {Perturbation("noise", 3): worse, Perturbation("typos", 1): other, Perturbation("blur", 1): CLEAN}, UNITS)
    assert found["clean"]["mean"] == 0.75
    noise, typos, blur = found["drops"]
    assert (noise["name"], noise["strength"], noise["kind"]) == ("noise", 3, "visual")
    assert (noise["right"], noise["drop"], noise["n"]) == (0.5, 0.25, 4)
    assert noise["low"] < 0 < noise["drop"] < noise["high"]
    assert (typos["kind"], typos["drop"]) == ("textual", pytest.approx(0.7 / 4))
    assert (blur["low"], blur["drop"], blur["high"]) == (0, 0, 0)
    json.dumps(found)


def test_pairs_are_narrower_than_two_intervals():
    right = np.random.default_rng(0).random(400) < 0.5
    clean, then = items(*right.tolist()), items(*(right & (np.arange(400) % 10 > 0)).tolist())
    found = robustness(clean, {Perturbation("noise", 1): then}, [str(number) for number in range(400)])
    drop = found["drops"][0]
    assert drop["high"] - drop["low"] < 0.5 * (found["clean"]["high"] - found["clean"]["low"])
    assert drop["low"] > 0


def test_paired_by_id_not_by_order():
    """Questions that share an id are paired by their order."""
    repeated = [{"id": "x", "right": True}, {"id": "y", "right": False}, {"id": "x", "right": False}]
    moved = [repeated[1], repeated[0], repeated[2]]
    drop = robustness(repeated, {Perturbation("noise", 1): moved}, ["a", "b", "a"])["drops"][0]
    assert (drop["low"], drop["drop"], drop["high"]) == (0, 0, 0)


def test_units_are_drawn_together():
    worse = items(False, False, True, False)
    alone = robustness(CLEAN, {Perturbation("noise", 1): worse}, ["a", "b", "c", "d"])["drops"][0]
    together = robustness(CLEAN, {Perturbation("noise", 1): worse}, ["a", "a", "b", "b"])["drops"][0]
    assert (together["low"], together["high"]) == (0, 1)
    assert alone["high"] <= 1


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (CLEAN[:3], "questions were scored with or without noise:1 only, 1 in all: 3"),
        ([*CLEAN, {"id": "9", "right": True}], "only, 1 in all: 9"),
        ([*CLEAN[:3], {"id": "3", "right": None}], "question 3 under noise:1 has None as right"),
        ([], "no question was scored under noise:1"),
    ],
)
def test_refusals(then, message):
    with pytest.raises(BenchmarkError, match=message):
        robustness(CLEAN, {Perturbation("noise", 1): then}, UNITS)


def test_picture(tmp_path):
    random = np.random.default_rng(0)
    right = random.random(200) < 0.8
    perturbed = {
        Perturbation(name, strength): items(*(right & (random.random(200) > 0.02 * strength * (1 + place))).tolist())
        for place, name in enumerate(KINDS)
        for strength in STRENGTHS
    }
    summary = robustness(items(*right.tolist()), perturbed, [str(number) for number in range(200)])
    figure = plot_robustness(summary, "POPE")
    assert [axis.get_title("left") for axis in figure.axes] == ["visual", "textual", "adversarial"]
    for axis in figure.axes:
        _, names = axis.get_legend_handles_labels()
        assert names == [name for name, kind in KINDS.items() if kind == axis.get_title("left")]
        colours = [to_hex(line.get_color()).upper() for line in axis.lines if len(line.get_xdata()) == 5 and line.get_linestyle() == "-"]
        assert colours == list(EXPERT_COLOURS[: len(names)])
    figure.savefig(tmp_path / "robustness.png")
    alone = {**summary, "drops": [drop for drop in summary["drops"] if drop["name"] == "typos" and drop["strength"] == 3]}
    assert [axis.get_title("left") for axis in plot_robustness(alone).axes] == ["textual"]
    plt.close("all")
