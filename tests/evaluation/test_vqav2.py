"""VQAv2: the validation set scored by hand, the test set's upload."""

import json

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result, split_in
from moe_llava.evaluation.score.questions import pair
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.scoring import score_answers

VQAV2 = find_benchmark("vqav2")
SUFFIX = "\nAnswer the question using a single word or phrase."

# Answers of ten annotators, answer type, question type.
ANNOTATED = {
    1: (["yes"] * 8 + ["no"] * 2, "yes/no", "is the"),
    2: (["Two."] * 10, "number", "how many"),  # all alike: taken as they are, so that "2" is wrong
    3: (["red-white"] * 2 + ["red"] * 8, "other", "what color is the"),
    4: (["no"] * 10, "yes/no", "is the"),
}


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def questions_file(file, ids):
    write_lines(file, [{"question_id": i, "image": f"COCO_{i // 3}.jpg", "text": f"q{i}?{SUFFIX}", "category": "default"} for i in ids])


@pytest.fixture
def validation(tmp_path):
    folder = tmp_path / "vqav2"
    folder.mkdir()
    questions_file(folder / "llava_vqav2_mscoco_val2014.jsonl", ANNOTATED)
    annotations = [
        {
            "question_id": identity,
            "image_id": identity,
            "question_type": question_type,
            "answer_type": answer_type,
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k, answer in enumerate(answers, 1)],
        }
        for identity, (answers, answer_type, question_type) in ANNOTATED.items()
    ]
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return find_folder(VQAV2, tmp_path)


@pytest.fixture
def secret(tmp_path):
    folder = tmp_path / "vqav2"
    folder.mkdir(exist_ok=True)
    questions_file(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", [12, 10])
    questions_file(folder / "llava_vqav2_mscoco_test2015.jsonl", [10, 11, 12, 13])
    return find_folder(VQAV2, tmp_path)


def answered(folder, texts):
    questions = VQAV2.questions(folder)
    given, unknown = pair(questions, [{"question_id": identity, "text": text} for identity, text in texts.items()], folder)
    assert not unknown
    return questions, given


def scores(folder, texts):
    questions, given = answered(folder, texts)
    scored = VQAV2.score(folder, questions, given)
    return [item["right"] for item in scored.items], result(VQAV2, scored, questions, given)


def test_scores_worked_by_hand(validation):
    right, found = scores(validation, {4: " NO\n", 3: "Red-White", 2: "two", 1: "Yes."})
    assert right == pytest.approx([1.0, 0.0, 0.6, 1.0], abs=1e-12)
    assert found["scores"] == pytest.approx(
        {
            "accuracy": 65.0,
            "answer_type/number": 0.0,
            "answer_type/other": 60.0,
            "answer_type/yes/no": 100.0,
            "question_type/how many": 0.0,
            "question_type/is the": 100.0,
            "question_type/what color is the": 60.0,
        }
    )
    assert found["missing"] == []
    assert found["intervals"].keys() == found["scores"].keys()
    assert VQAV2.questions(validation)[0].images == (validation / "val2014" / "COCO_0.jpg",)


def test_a_missing_answer_is_named_and_wrong(validation):
    right, found = scores(validation, {1: "no", 2: "", 4: "no"})
    assert right == pytest.approx([0.6, 0.0, 0.0, 1.0], abs=1e-12)
    assert found["missing"] == ["3"]


def test_what_scoring_lacks_is_said(validation, secret):
    assert VQAV2.questions(validation)[0].id == "1"  # both are there: the validation set's
    with pytest.raises(BenchmarkError, match=r"test2015.jsonl lacks 4 questions, such as 1: only test questions"):
        VQAV2.upload(validation, *answered(validation, {}), validation / "out")
    found = split_in(VQAV2, validation)
    assert (found.score, found.upload) == (VQAV2.score, None)
    (validation / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(BenchmarkError, match=r"VQAv2 needs in .*vqav2:\n  v2_mscoco_val2014_annotations.json: the annotators' answers"):
        split_in(VQAV2, validation)
    (validation / "llava_vqav2_mscoco_val2014.jsonl").unlink()
    (secret / "answers.jsonl").write_text('{"question_id": 10, "text": "two"}')
    with pytest.raises(BenchmarkError, match=r"VQAv2's test-dev, as .*vqav2 has it, is scored by a server only"):
        score_answers("vqav2", secret, secret / "answers.jsonl")


def test_what_an_upload_needs_is_said_before_it_is_written(secret):
    found = split_in(VQAV2, secret)
    assert (found.score, found.upload) == (None, VQAV2.upload)
    assert "llava_vqav2_mscoco_test2015.jsonl" in str(VQAV2.files)
    (secret / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    with pytest.raises(BenchmarkError, match=r"needs in .*vqav2:\n  llava_vqav2_mscoco_test2015\.jsonl: the list of all test questions"):
        split_in(VQAV2, secret)


def test_upload_covers_the_whole_test_set(secret, tmp_path):
    questions, given = answered(secret, {10: "Two dogs.", 12: "John's"})
    assert questions[0].images == (secret / "test2015" / "COCO_4.jpg",)
    (file,) = VQAV2.upload(secret, questions, given, tmp_path / "out" / "deep")
    assert json.loads(file.read_text()) == [
        {"question_id": 10, "answer": "2 dogs"},
        {"question_id": 11, "answer": ""},
        {"question_id": 12, "answer": "john 's"},
        {"question_id": 13, "answer": ""},
    ]


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"llava_vqav2_mscoco_val2014.jsonl or llava_vqav2_mscoco_test-dev2015.jsonl: the questions"):
        find_folder(VQAV2, tmp_path)


def test_damaged_annotations_are_named(validation):
    file = validation / "v2_mscoco_val2014_annotations.json"
    annotations = json.loads(file.read_text())
    del annotations["annotations"][1]["answer_type"]
    file.write_text(json.dumps(annotations))
    with pytest.raises(BenchmarkError, match=r"the annotation of question 2 in .* has no 'answer_type'"):
        scores(validation, {})
    file.write_text(json.dumps({"annotations": annotations["annotations"][1:]}))
    with pytest.raises(BenchmarkError, match=r"question 1 of .* is not in v2_mscoco"):
        scores(validation, {})
    file.write_text("[]")
    with pytest.raises(BenchmarkError, match="must be an object"):
        scores(validation, {})
