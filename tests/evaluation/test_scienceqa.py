"""ScienceQA's scores equal those of the published script, item by item; unread answers are read leniently in addition."""

import json

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result
from moe_llava.evaluation.score.questions import LETTER, pair
from moe_llava.evaluation.score.reading import BenchmarkError, read_json_lines

SCIENCEQA = find_benchmark("scienceqa")
UNANSWERED = "1259"  # the published script takes it as answered with "FAILED"


@pytest.fixture
def folder(golden):
    return find_folder(SCIENCEQA, golden / "eval")


@pytest.fixture
def answers(folder):
    return read_json_lines(folder / "answers" / "fixture-model.jsonl")


def scored(folder, answers):
    questions = SCIENCEQA.questions(folder)
    given, unknown = pair(questions, answers, folder / "answers")
    assert not unknown
    return SCIENCEQA.score(folder, questions, given), questions, given


def scores(folder, answers):
    found, questions, given = scored(folder, answers)
    return result(SCIENCEQA, found, questions, given)


def test_items_are_the_published_ones(folder, answers):
    items = scored(folder, answers)[0].items
    for item, expected in zip(items, json.loads((folder / "expected_items.json").read_text()), strict=True):
        assert item["id"] == expected["question_id"]
        assert (item["given"] is None) == (item["id"] == UNANSWERED)
        assert (item["given"] or expected["pred"]) == expected["pred"]
        assert (item["read"] or "FAILED") == expected["parsed_ans"]
        assert item["expected"] == expected["ground_truth"]
        assert item["right"] == expected["correct"]


def test_scores_are_the_published_ones(folder, answers):
    found = scores(folder, answers[::-1])  # in whatever order the answers come
    total = json.loads((folder / "expected_result.json").read_text())
    assert found["scores"]["accuracy"] == total["acc"] == 20
    with_image = [item for item in json.loads((folder / "expected_items.json").read_text()) if item["is_multimodal"]]
    assert found["scores"]["IMG-accuracy"] == sum(item["correct"] for item in with_image) / len(with_image) * 100
    assert f"IMG-Accuracy: {found['scores']['IMG-accuracy']:.2f}%" in json.loads((folder / "expected.json").read_text())["stdout"]
    assert found["scores"]["subject/natural science"] == found["scores"]["grade/1-6"] == 20
    assert "grade/7-12" not in found["scores"]
    low, high = found["intervals"]["accuracy"]
    assert low < 20 < high


# Letters that the published script does not read, from the answers of the fixture.
LENIENT = {"A.": "A", "(A)": "A", "The answer is A": "A", "a": "A", " A": "A", "A ": "A", "the answer is B.": "B", "Answer: B": "B"}
LENIENT |= {"The answer is (B).": "B", "B) no": "B", "B, no": "B", "B\n": "B", "**B**": "B", "D.\nBecause": "D", "FAILED": None}
LENIENT |= {"The answer is B. The answer is C.": None, "A and B": None, "AB": None, "None": None, "": None, "The answer is Z.": None}


def test_lenient_reading(folder, answers):
    items = {item["given"]: item for item in scored(folder, answers)[0].items}
    assert {given: items[given]["read (lenient)"] for given in LENIENT} == LENIENT
    right = sum(item["right (lenient)"] for item in items.values())
    assert right > sum(item["right"] for item in items.values())


def test_context_is_text_image_both_or_none(folder, answers):
    problems = json.loads((folder / "problems.json").read_text())
    items = scored(folder, answers)[0].items
    found = scores(folder, answers)["scores"]
    chosen = {
        "context/text": [item["right"] for item in items if problems[item["id"]]["hint"]],
        "context/image": [item["right"] for item in items if problems[item["id"]]["image"]],
        "context/none": [item["right"] for item in items if not problems[item["id"]]["hint"] and not problems[item["id"]]["image"]],
    }
    for name, right in chosen.items():
        assert found[name] == sum(right) / len(right) * 100


def test_prompts_ask_for_the_letter_and_leave_the_image_to_the_model(folder):
    first, second = SCIENCEQA.questions(folder)[:2]
    assert first.prompt.startswith("Context: Read the passage.  It has two spaces.\nWhich is fixture 0?\nA. choice")
    assert first.prompt.endswith(LETTER)
    assert first.images == (folder / "images" / "test" / "1000" / "image.png",)
    assert second.images == ()


def test_a_missing_answer_is_named_and_wrong(folder, answers):
    found = scores(folder, answers[1:])
    assert found["missing"] == ["1000", UNANSWERED]
    assert found["scores"]["accuracy"] == 7 / 40 * 100


def test_the_first_questions_are_scored_alone(folder, answers):
    """The only selected question, the second one, has no image."""
    asked = SCIENCEQA.questions(folder)[1:2]
    found = result(SCIENCEQA, SCIENCEQA.score(folder, asked, [None]), asked, [None])
    assert found["scores"]["accuracy"] == 0
    assert not {"IMG-accuracy", "context/image"} & found["scores"].keys()


def change(folder, to, name, old, new):
    for file in ("llava_test_CQM-A.json", "problems.json", "pid_splits.json"):
        text = (folder / file).read_text()
        assert file != name or old in text
        (to / file).write_text(text.replace(old, new, 1) if file == name else text)
    return to


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("pid_splits.json", '"test": [', '"test": ["77", ', "1 are in one only, such as 77"),
        ("problems.json", '"1000"', '"77"', r"problems.json has no problem 1000, which is a question of llava_test_CQM-A.json"),
        ("problems.json", '"answer": 0', '"answer": 2', r"question 1000 of .*problems.json has the answer 2, but the options A, B"),
        ("problems.json", '"grade2"', '"grade13"', r"problem 1000 of .*problems.json has the grade 'grade13', but must have grade1 to"),
        ("llava_test_CQM-A.json", '"conversations"', '"turns"', r"record 1 of .*llava_test_CQM-A.json has no 'conversations'"),
    ],
)
def test_damaged_files(folder, answers, tmp_path, name, old, new, message):
    with pytest.raises(BenchmarkError, match=message):
        scored(change(folder, tmp_path, name, old, new), answers)
