"""Scores worked by hand."""

from pathlib import Path

import pytest

from moe_llava.data.records import Record
from moe_llava.evaluation.digits import Answered, accuracy, compare, existence
from moe_llava.evaluation.statistics import bootstrap_mean


def answered(family, expected, given, kind="", image="a.png"):
    record = Record("test", ((f"<image>\n{family} ?", expected),), (Path(image),), {"family": family, "kind": kind, "id": "1"})
    return Answered(record, given)


def test_accuracy_per_family():
    items = [answered("sum", "7", "7"), answered("sum", "7", "8"), answered("colour", "red", "red")]
    scores = accuracy(items)
    assert scores["all"]["mean"] == pytest.approx(2 / 3)
    assert scores["sum"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 2}  # one picture: nothing to resample
    assert scores["colour"]["n"] == 1
    assert items[0].question == "sum ?"


def test_existence_pairs_each_kind_with_positives_of_the_same_pictures():
    items = [answered("existence", "yes", given, "positive", image) for given, image in (("yes", "a.png"), ("no", "b.png"))]
    items += [answered("existence", "no", "no", "random", image) for image in ("a.png", "b.png")]
    items += [answered("existence", "no", "no", "adversarial", "a.png")]
    scores = existence(items)
    assert (scores["random"]["n"], scores["random"]["recall"]) == (4, 0.5)
    assert (scores["adversarial"]["n"], scores["adversarial"]["recall"]) == (2, 1.0)


def test_compare_is_paired():
    one = [answered("sum", "7", given, image=f"{index}.png") for index, given in enumerate("7788")]
    other = [answered("sum", "7", given, image=f"{index}.png") for index, given in enumerate("7878")]
    assert compare(one, other)["mean"] == 0.0
    assert compare(one, one) == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}


def test_existence_as_pope_scores_it():
    items = [answered("existence", "yes", given, "positive") for given in ("yes", "yes", "no")]
    items += [answered("existence", "no", given, "adversarial") for given in ("yes", "no", "no")]
    items += [answered("existence", "no", "no", "random")]
    scores = existence(items)
    assert list(scores) == ["adversarial", "random"]
    adversarial = scores["adversarial"]
    assert adversarial["precision"] == pytest.approx(2 / 3)
    assert adversarial["recall"] == pytest.approx(2 / 3)
    assert adversarial["f1"] == pytest.approx(2 / 3)
    assert adversarial["accuracy"] == pytest.approx(4 / 6)
    assert adversarial["yes_share"] == pytest.approx(0.5)
    assert scores["random"]["precision"] == 1.0


def test_existence_without_any_yes():
    scores = existence([answered("existence", "yes", "", "positive"), answered("existence", "no", "no", "random")])
    assert scores["random"]["f1"] == 0.0


def test_bootstrap_draws_whole_groups():
    alone = bootstrap_mean([0.0, 1.0] * 50, [str(number) for number in range(100)])
    assert alone.mean == 0.5
    assert 0.38 < alone.low < 0.43
    assert 0.57 < alone.high < 0.62
    paired = bootstrap_mean([0.0] * 50 + [1.0] * 50, [str(number // 10) for number in range(100)])
    assert paired.low < alone.low
