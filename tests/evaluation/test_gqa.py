"""GQA: scores worked by hand, the upload."""

import json

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result
from moe_llava.evaluation.score.questions import pair
from moe_llava.evaluation.score.reading import BenchmarkError

GQA = find_benchmark("gqa")
SUFFIX = "\nAnswer the question using a single word or phrase."


def program(*steps):
    return [{"operation": operation, "dependencies": [], "argument": argument} for operation, argument in steps]


def record(image, question, answer, structural, semantic, steps, balanced=True):
    types = {"structural": structural, "semantic": semantic, "detailed": "x"}
    return {"imageId": image, "question": question, "answer": answer, "types": types, "semantic": steps, "isBalanced": balanced}


TRUTH = {
    "201": record("n1", "Is it red?", "yes", "verify", "attr", program(("select", "ball (1)"), ("verify color", "red"))),
    "202": record("n1", "What is on the table?", "dog", "query", "rel", program(("select", "t"), ("relate", "_,on,s"), ("query", "name"))),
    "203": record("n2", "Is there a cat?", "no", "verify", "obj", program(("select", "cat (-)"), ("exist", "?"))),
    "204": record("n2", "Which colour?", "red", "query", "attr", program(("select", "b"), ("query", "color"))),
    "205": record("n2", "Which one?", "left", "choose", "rel", program(("select", "b"), ("choose rel", "l|r")), balanced=False),
}


@pytest.fixture(params=["data", "."])
def folder(tmp_path, request):
    """The ground truth may be in either place."""
    folder = tmp_path / "gqa"
    (folder / request.param).mkdir(parents=True)
    (folder / request.param / "testdev_balanced_questions.json").write_text(json.dumps(TRUTH))
    lines = [
        {"question_id": key, "image": f"{value['imageId']}.jpg", "text": value["question"] + SUFFIX, "category": "default"}
        for key, value in TRUTH.items()
    ]
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return find_folder(GQA, tmp_path)


def answered(folder, texts):
    questions = GQA.questions(folder)
    given, unknown = pair(questions, [{"question_id": identity, "text": text} for identity, text in texts.items()], folder)
    assert not unknown
    return questions, given


def scores(folder, texts):
    questions, given = answered(folder, texts)
    scored = GQA.score(folder, questions, given)
    return [item["right"] for item in scored.items], result(GQA, scored, questions, given)


def test_scores_worked_by_hand(folder):
    right, found = scores(folder, {"205": "left", "204": "blue", "203": "NO..", "202": "A dog.", "201": "Yes"})
    assert right == [True, False, True, False]  # 205 is not balanced
    assert found["scores"] == {
        "accuracy": 50.0,
        "accuracy (lenient)": 75.0,
        "answers/binary": 100.0,
        "answers/open": 0.0,
        "structural/query": 0.0,
        "structural/verify": 100.0,
        "semantic/attr": 50.0,
        "semantic/obj": 100.0,
        "semantic/rel": 0.0,
        "words/2": 0.0,
        "words/3": 100.0,
        "words/4": 100.0,
        "words/5": 0.0,
        # Neither "exist" nor asking for a name is a step.
        "steps/1": 100.0,
        "steps/2": pytest.approx(100 / 3),
    }
    assert found["missing"] == []
    assert found["intervals"].keys() == found["scores"].keys()
    assert GQA.questions(folder)[0].images == (folder / "data" / "images" / "n1.jpg",)


def test_without_programs_there_are_no_steps(folder):
    file = next(folder.rglob("testdev_balanced_questions.json"))
    file.write_text(json.dumps({key: {name: x for name, x in value.items() if name != "semantic"} for key, value in TRUTH.items()}))
    _, found = scores(folder, {"201": "yes"})
    assert found["scores"]["accuracy"] == 25.0
    assert not any(name.startswith("steps/") for name in found["scores"])


def test_a_missing_answer_is_named_and_wrong(folder):
    right, found = scores(folder, {"201": "yes", "203": "", "204": "red\n"})
    assert right == [True, False, False, False]
    assert found["missing"] == ["202", "205"]
    assert (found["scores"]["accuracy"], found["scores"]["accuracy (lenient)"]) == (25.0, 50.0)


def test_upload(folder, tmp_path):
    questions, given = answered(folder, {"201": "Yes.", "203": "a Cat"})
    (file,) = GQA.upload(folder, questions, given, tmp_path / "out")
    assert json.loads(file.read_text())[:3] == [
        {"questionId": "201", "prediction": "yes"},
        {"questionId": "202", "prediction": ""},
        {"questionId": "203", "prediction": "a cat"},
    ]


def test_damaged_truth_is_named(folder):
    file = next(folder.rglob("testdev_balanced_questions.json"))
    for content, rule in (
        ({key: value for key, value in TRUTH.items() if key != "203"}, "question 203 of .* is not in "),
        (TRUTH | {"202": {"answer": "dog"}}, "question 202 of .* has no 'isBalanced'"),
        (TRUTH | {"202": "dog"}, "question 202 of .* must be an object"),
        ([], "must be an object"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(BenchmarkError, match=rule):
            scores(folder, {})
    file.unlink()
    with pytest.raises(BenchmarkError, match=r"testdev_balanced_questions\.json: their answers and types"):
        find_folder(GQA, folder)
