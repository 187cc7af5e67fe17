"""VizWiz: the validation set scored by hand, the test set's upload."""

import json

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result, split_in
from moe_llava.evaluation.score.questions import pair
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.scoring import score_answers

VIZWIZ = find_benchmark("vizwiz")
SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\nAnswer the question using a single word or phrase."

# Image, answers of ten annotators, answer type, whether it can be answered.
ANNOTATED = [
    ("val_0.jpg", ["unanswerable"] * 7 + ["blurry"] * 3, "unanswerable", 0),
    ("val_1.jpg", ["coca-cola"] * 4 + ["coca cola"] * 2 + ["coke"] * 4, "other", 1),  # hyphens stay in what annotators said
    ("val_2.jpg", ["unanswerable"] * 3 + ["7 up"] * 7, "other", 1),
    ("val_3.jpg", ["unsuitable"] * 10, "unanswerable", 0),
]


def records():
    return [
        {
            "image": image,
            "question": f"What is this in {image}?",
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
            "answer_type": kind,
            "answerable": answerable,
        }
        for image, answers, kind, answerable in ANNOTATED
    ]


@pytest.fixture
def validation(tmp_path):
    folder = tmp_path / "vizwiz"
    folder.mkdir()
    (folder / "val.json").write_text(json.dumps(records()))
    return find_folder(VIZWIZ, tmp_path)


@pytest.fixture
def secret(tmp_path):
    folder = tmp_path / "vizwiz"
    folder.mkdir(exist_ok=True)
    lines = [{"question_id": i, "image": f"test_{i}.jpg", "text": f"What is this?{SUFFIX}", "category": "default"} for i in range(3)]
    (folder / "llava_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return find_folder(VIZWIZ, tmp_path)


def answered(folder, texts):
    questions = VIZWIZ.questions(folder)
    given, unknown = pair(questions, [{"question_id": identity, "text": text} for identity, text in texts.items()], folder)
    assert not unknown
    return questions, given


def scores(folder, texts):
    questions, given = answered(folder, texts)
    scored = VIZWIZ.score(folder, questions, given)
    return [item["right"] for item in scored.items], result(VIZWIZ, scored, questions, given)


def test_scores_worked_by_hand(validation):
    texts = {"val_0.jpg": "Unanswerable.", "val_1.jpg": "Coca-Cola", "val_2.jpg": "unanswerable", "val_3.jpg": "a dog\t"}
    right, found = scores(validation, texts)
    assert right == pytest.approx([1.0, 0.6, 0.9, 0.0], abs=1e-12)
    assert found["scores"] == pytest.approx(
        {
            "accuracy": 62.5,
            "answer_type/other": 75.0,
            "answer_type/unanswerable": 50.0,
            # Said of 0 and 2, true of 0 and 3.
            "unanswerable/precision": 50.0,
            "unanswerable/recall": 50.0,
            "unanswerable/f1": 50.0,
        }
    )
    assert found["intervals"].keys() == found["scores"].keys()
    question = VIZWIZ.questions(validation)[1]
    assert (question.id, question.prompt) == ("val_1.jpg", f"What is this in val_1.jpg?{SUFFIX}")
    assert question.images == (validation / "val" / "val_1.jpg",)


def test_a_missing_answer_is_named_and_wrong(validation):
    right, found = scores(validation, {"val_1.jpg": "coke"})
    assert right == [0.0, 1.0, 0.0, 0.0]
    assert found["missing"] == ["val_0.jpg", "val_2.jpg", "val_3.jpg"]
    assert [found["scores"][f"unanswerable/{name}"] for name in ("precision", "recall", "f1")] == [0, 0, 0]


def test_upload(secret, tmp_path):
    questions, given = answered(secret, {2: "Unanswerable.", 0: "Two\ncans"})
    assert questions[0].images == (secret / "test" / "test_0.jpg",)
    (file,) = VIZWIZ.upload(secret, questions, given, tmp_path / "out")
    assert json.loads(file.read_text()) == [
        {"image": "test_0.jpg", "answer": "2 cans"},
        {"image": "test_1.jpg", "answer": ""},
        {"image": "test_2.jpg", "answer": "unanswerable"},
    ]


def test_the_test_set_is_not_scored(secret):
    found = split_in(VIZWIZ, secret)
    assert (found.score, found.upload) == (None, VIZWIZ.upload)
    (secret / "answers.jsonl").write_text('{"question_id": 0, "text": "a dog"}')
    with pytest.raises(BenchmarkError, match=r"VizWiz's test set, as .*vizwiz has it, is scored by a server only"):
        score_answers("vizwiz", secret, secret / "answers.jsonl")


def test_of_both_sets_the_one_that_can_be_scored_is_asked(validation, secret):
    assert VIZWIZ.questions(validation)[0].id == "val_0.jpg"
    found = split_in(VIZWIZ, validation)
    assert (found.score, found.upload) == (VIZWIZ.score, None)


def test_what_was_not_asked_has_no_score(validation):
    """The second question alone gives no score for unanswerable questions."""
    questions = VIZWIZ.questions(validation)[1:2]
    found = result(VIZWIZ, VIZWIZ.score(validation, questions, ["coke"]), questions, ["coke"])
    assert found["scores"] == {"accuracy": 100, "answer_type/other": 100, "unanswerable/precision": 0}
    assert found["intervals"]["accuracy"] == (100, 100)


@pytest.mark.parametrize("key", ["answers", "answer_type", "answerable"])
def test_records_without_truth_are_named(validation, key):
    stripped = records()
    del stripped[2][key]
    (validation / "val.json").write_text(json.dumps(stripped))
    with pytest.raises(BenchmarkError, match=rf"val_2.jpg of .*val.json has no '{key}'"):
        scores(validation, {})


@pytest.mark.parametrize(("content", "rule"), [('{"image": 1}', "must be a list of records"), ("[1]", "record 1 of .* must be an object")])
def test_damaged_records_are_named(validation, content, rule):
    (validation / "val.json").write_text(content)
    with pytest.raises(BenchmarkError, match=rule):
        VIZWIZ.questions(validation)
