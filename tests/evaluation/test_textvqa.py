"""TextVQA's scores equal those of the published script, item by item."""

import json
import shutil

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result
from moe_llava.evaluation.score.definitions.textvqa import bare_question
from moe_llava.evaluation.score.normalise import leave_one_out
from moe_llava.evaluation.score.questions import pair
from moe_llava.evaluation.score.reading import BenchmarkError, read_json_lines

TEXTVQA = find_benchmark("textvqa")


@pytest.fixture
def folder(golden):
    return find_folder(TEXTVQA, golden / "eval")


@pytest.fixture
def answers(folder):
    return read_json_lines(folder / "answers" / "fixture-model.jsonl")


def scored(folder, answers):
    questions = TEXTVQA.questions(folder)
    given, unknown = pair(questions, answers, folder / "answers")
    assert not unknown
    scored = TEXTVQA.score(folder, questions, given)
    return scored.items, result(TEXTVQA, scored, questions, given)


@pytest.mark.parametrize("step", [1, -1])
def test_scores_are_the_published_ones(folder, answers, step):
    """The order of the answers does not matter."""
    items, found = scored(folder, answers[::step])
    expected = json.loads((folder / "expected.json").read_text())
    assert len(items) == expected["n"]
    for item, theirs in zip(items, expected["items"], strict=True):
        assert (item["id"], item["question"], item["given"]) == (theirs["question_id"], theirs["question"], theirs["pred"])
        assert (item["read"], item["right"]) == (theirs["pred_normalized"], theirs["score"])
        assert {answer: leave_one_out(answer, item["expected"]) for answer in item["expected"]} == theirs["unique_answer_scores"]
    assert found["scores"] == {"accuracy": 100 * expected["mean"]}
    assert f"{found['scores']['accuracy']:.2f}%" in expected["stdout"]
    low, high = found["intervals"]["accuracy"]
    assert low < found["scores"]["accuracy"] < high


def test_a_missing_answer_is_named_and_wrong(folder, answers):
    whole, _ = scored(folder, answers)
    items, found = scored(folder, answers[:2] + answers[3:])
    assert found["missing"] == [answers[2]["question_id"]]
    assert (whole[2]["right"], items[2]["right"]) == (1.0, 0.0)
    assert found["scores"]["accuracy"] == pytest.approx(100 * (sum(item["right"] for item in whole) - 1) / len(whole))


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What?\nReference OCR token: a, b\nAnswer the question using a single word or phrase.", "What?"),
        ("What?\nReference OCR token: a\nb\nAnswer the question using a single word or phrase.", "What?"),  # a token with a line break
        ("Reference OCR token: a, b\nWhat?\nAnswer the question using a single word or phrase.", "What?"),
        ("OCR tokens: a, b. Question: What\nis it? Short answer:", "What\nis it?"),
        ("What?\nAnswer the question using a single word or phrase.", "What?"),
        ("What?", "What?"),
    ],
)
def test_questions_are_found_in_prompts(prompt, question):
    assert bare_question(prompt) == question


def test_a_question_without_annotation_is_named(folder, answers, tmp_path):
    shutil.copytree(folder, tmp_path / "textvqa")
    copy = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    copy.chmod(0o644)
    annotations = json.loads(copy.read_text())
    annotations["data"] = [record for record in annotations["data"] if record["image_id"] != "a0005"]
    copy.write_text(json.dumps(annotations))
    with pytest.raises(BenchmarkError, match=r"question 'who wrote it\?' about image a0005 .* is not in TextVQA_0.5.1_val.json"):
        scored(tmp_path / "textvqa", answers)
