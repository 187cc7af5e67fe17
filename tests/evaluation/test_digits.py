"""Scores worked by hand."""

import json
from pathlib import Path

import pytest

from moe_llava.digits.dataset import write_dataset
from moe_llava.digits.scenes import HARD
from moe_llava.evaluation.score.benchmark import Options, configured, find_benchmark, result
from moe_llava.evaluation.score.definitions.digits_world import accuracy, compare, existence, judge
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.statistics import bootstrap_mean
from tests.training.conftest import tiny_base  # noqa: F401


def answered(family, expected, given, kind="", image="a.png"):
    question = Question("1", f"<image>\n{family} ?", (Path(image),), {"family": family, "kind": kind, "answer": expected})
    return judge(question, given)


def test_accuracy_per_family():
    items = [answered("sum", "7", "7"), answered("sum", "7", "8"), answered("colour", "red", "red")]
    scores = accuracy(items)
    assert scores["all"]["mean"] == pytest.approx(2 / 3)
    assert scores["sum"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 2}  # one picture: nothing to resample
    assert scores["colour"]["n"] == 1
    assert items[0]["question"] == "sum ?"


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


def test_the_benchmark_says_what_the_report_says(tiny_base):  # noqa: F811
    folder = tiny_base / "data"
    benchmark = find_benchmark("digits")
    questions = benchmark.questions(folder)
    truth = [question.extra["answer"] for question in questions]
    given = [None if index % 5 == 0 else text if index % 3 else "yes" for index, text in enumerate(truth)]
    scored = benchmark.score(folder, questions, given)
    found = result(benchmark, scored, questions, given)
    assert found["missing"] == [question.id for question in questions[::5]]
    by_family = accuracy(scored.items)
    assert found["scores"]["accuracy"] == pytest.approx(by_family.pop("all")["mean"])
    for family, score in by_family.items():
        assert found["scores"][f"{family}/accuracy"] == pytest.approx(score["mean"])
    for kind, score in existence(scored.items).items():
        for name in ("accuracy", "precision", "recall", "f1", "yes_share"):
            assert found["scores"][f"existence/{kind}/{name}"] == score[name]
    everything = result(benchmark, benchmark.score(folder, questions, truth), questions, truth)["scores"]
    assert {value for name, value in everything.items() if not name.endswith("yes_share")} == {1.0}


def test_as_own_questions_they_have_the_same_score_by_family(tiny_base):  # noqa: F811
    digits, own = (
        find_benchmark("digits"),
        configured(find_benchmark("questions"), Options(tiny_base / "data" / "images", group_by="family")),
    )
    asked, same = digits.questions(tiny_base / "data"), own.questions(tiny_base / "data" / "test.json")
    given = [text if index % 3 else "nothing" for index, text in enumerate(question.extra["answer"] for question in asked)]
    scores = result(digits, digits.score(tiny_base / "data", asked, given), asked, given)
    found = result(own, own.score(tiny_base / "data" / "test.json", same, given), same, given)
    for family in {question.extra["family"] for question in asked}:
        assert found["scores"][f"family/{family}"] == pytest.approx(100 * scores["scores"][f"{family}/accuracy"])
    assert found["intervals"]["accuracy"] == pytest.approx([100 * value for value in scores["intervals"]["accuracy"]])


def test_the_interval_of_a_family_is_of_resamples_that_have_it(tiny_base):  # noqa: F811
    """All answers are right, so all resamples are; only the family of the one question has scores."""
    folder, benchmark = tiny_base / "data", find_benchmark("digits")
    questions = benchmark.questions(folder)
    rare = next(question for question in questions if question.extra["family"] == "comparison")
    asked = [question for question in questions if question.extra["family"] == "existence"] + [rare]
    truth = [question.extra["answer"] for question in asked]
    found = result(benchmark, benchmark.score(folder, asked, truth), asked, truth)
    assert {name.partition("/")[0] for name in found["scores"]} == {"accuracy", "existence", "comparison"}
    assert found["intervals"]["comparison/accuracy"] == (1, 1)
    assert {interval for name, interval in found["intervals"].items() if not name.endswith("yes_share")} == {(1, 1)}


def test_four_options_a_question(tiny_base, tmp_path):  # noqa: F811
    """Each question has its answer and three of others of its family, whatever else the file holds."""
    write_dataset(tmp_path, train_images=1, test_images=30, level=HARD)
    every, benchmark = find_benchmark("digits").questions(tmp_path), find_benchmark("digits-options")
    asked = benchmark.questions(tmp_path)
    assert [question.id for question in asked] == [
        question.id for question in every if question.extra["family"] not in ("existence", "comparison", "caption")
    ]
    for question in asked:
        same = {other.extra["answer"] for other in asked if other.extra["family"] == question.extra["family"]}
        assert len(set(question.options)) == 4
        assert question.extra["answer"] in question.options
        assert set(question.options) <= same
    places = [question.options.index(question.extra["answer"]) for question in asked]
    assert set(places) == {0, 1, 2, 3}
    truth = [question.extra["answer"] for question in asked]
    assert result(benchmark, benchmark.score(tmp_path, asked, truth), asked, truth)["scores"]["accuracy"] == 1
    with pytest.raises(BenchmarkError, match=r"test.json has . different answers to questions of the family \w+, but options need 4"):
        benchmark.questions(tiny_base / "data")


def test_a_missing_answer_is_wrong_either_way():
    items = [answered("existence", "yes", None, "positive"), answered("existence", "no", None, "random")]
    assert existence(items)["random"]["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": None}, "record 0 of .*test.json has no 'family'"),
        ({"image": None}, "record 0 of .*test.json has no image, but must have one"),
    ],
)
def test_damaged_questions_are_named(tiny_base, tmp_path, change, message):  # noqa: F811
    record = json.loads((tiny_base / "data" / "test.json").read_text())[0] | change
    (tmp_path / "test.json").write_text(json.dumps([{key: value for key, value in record.items() if value is not None}]))
    with pytest.raises(BenchmarkError, match=message):
        find_benchmark("digits").questions(tmp_path)
