"""POPE's scores equal those of the published script, item by item; where the script crashes, there are scores."""

import json

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result
from moe_llava.evaluation.score.definitions.pope import says_yes
from moe_llava.evaluation.score.metrics import says_yes_leniently
from moe_llava.evaluation.score.questions import pair
from moe_llava.evaluation.score.reading import read_json_lines

POPE = find_benchmark("pope")
NAMES = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1 score", "yes": "Yes ratio"}


@pytest.fixture
def folder(golden):
    return find_folder(POPE, golden / "eval")


def scores(folder, answers):
    questions = POPE.questions(folder)
    given, unknown = pair(questions, answers, folder / "answers")
    assert not unknown
    return result(POPE, POPE.score(folder, questions, given), questions, given)


def test_reading(folder):
    for case in json.loads((folder / "expected_parsing.json").read_text()):
        assert says_yes(case["text"]) == (case["parsed"] == "yes"), case


@pytest.mark.parametrize("case", ["fixture-model", "case_reordered"])
def test_scores_are_the_published_ones(folder, case):
    """The order of the answers does not matter."""
    found = scores(folder, read_json_lines(folder / "answers" / f"{case}.jsonl"))
    expected = json.loads((folder / "expected_fixture-model.json").read_text())["metrics"]
    for category, metrics in expected.items():
        assert {name: found["scores"][f"{category}/{name}"] for name in NAMES} == {name: metrics[old] for name, old in NAMES.items()}
    assert found["missing"] == []
    low, high = found["intervals"]["random/f1"]
    assert low < found["scores"]["random/f1"] < high


def test_only_no_does_not_crash(folder):
    found = scores(folder, read_json_lines(folder / "answers" / "case_all_no.jsonl"))["scores"]
    assert found["adversarial/f1"] == found["adversarial/precision"] == 0
    assert found["adversarial/accuracy"] == 8 / 20


def test_a_missing_answer_is_named_and_wrong(folder):
    answers = read_json_lines(folder / "answers" / "fixture-model.jsonl")
    whole, found = scores(folder, answers), scores(folder, answers[1:])
    assert found["missing"] == [str(answers[0]["question_id"])]
    assert found["scores"]["adversarial/accuracy"] in (
        whole["scores"]["adversarial/accuracy"],
        whole["scores"]["adversarial/accuracy"] - 1 / 20,
    )


def test_categories_that_were_not_asked_are_absent(folder):
    """The file starts with the adversarial questions, so the means are over these only."""
    answers = {answer["question_id"]: answer["text"] for answer in read_json_lines(folder / "answers" / "fixture-model.jsonl")}
    asked = POPE.questions(folder)[:20]
    assert {question.extra["category"] for question in asked} == {"adversarial"}
    given = [answers[int(question.id)] for question in asked]
    found = result(POPE, POPE.score(folder, asked, given), asked, given)
    assert {name.partition("/")[0].removesuffix(" (lenient)") for name in found["scores"]} == {"adversarial", "accuracy", "f1"}
    assert found["scores"]["f1"] == found["scores"]["adversarial/f1"] > 0
    assert found["intervals"]["f1"] == found["intervals"]["adversarial/f1"]


@pytest.mark.parametrize(
    ("text", "says"), [("NO", False), ("none", False), ("There isn't a dog.", False), ("Yes, but not red", True), ("", None)]
)
def test_lenient_reading(text, says):
    assert says_yes_leniently(text) is says
