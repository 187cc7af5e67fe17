"""SEED-Bench: the letter alone counts; scores by type, image, video and in total, and the upload."""

import json

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result
from moe_llava.evaluation.score.questions import LETTER, pair
from moe_llava.evaluation.score.reading import BenchmarkError

SEED = find_benchmark("seed-bench")
OPTIONS = "\nA. One\nB. None\nC. NA\nD. Two" + LETTER


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "seed_bench"
    folder.mkdir()
    records = [
        {"question_id": 1, "image": "SEED-Bench-image/1", "category": "Instances Counting", "answer": "A"},
        {"question_id": 2, "image": "SEED-Bench-image/1", "category": "Instances Counting", "answer": "B"},
        {"question_id": 3, "image": "SEED-Bench-image/2", "category": "Visual Reasoning", "answer": "C"},
        {"question_id": "v4", "image": "SEED-Bench-video-image/10_4.png", "category": "Action Recognition", "answer": "D"},
    ]
    lines = [json.dumps({**record, "text": "How many?" + OPTIONS}) for record in records]
    (folder / "llava-seed-bench.jsonl").write_text("\n".join(lines))
    return find_folder(SEED, tmp_path)


def answered(folder, *texts):
    questions = SEED.questions(folder)
    answers = [{"question_id": question.id, "text": text} for question, text in zip(questions, texts, strict=False)]
    return questions, pair(questions, answers, folder / "answers")[0]


def test_scores(folder):
    questions, given = answered(folder, "A", "b. None", "NA", "")
    found = result(SEED, SEED.score(folder, questions, given), questions, given)["scores"]
    # Published: the letter alone, one of four. Leniently "b. None" and the option's own text NA, too.
    assert found == {
        "image": 1 / 3 * 100,
        "total": 1 / 4 * 100,
        "video": 0,
        "type/Action Recognition": 0,
        "type/Instances Counting": 1 / 2 * 100,
        "type/Visual Reasoning": 0,
        "image (lenient)": 100,
        "total (lenient)": 3 / 4 * 100,
        "type/Instances Counting (lenient)": 100,
        "type/Visual Reasoning (lenient)": 100,
    }


def test_missing_answers(folder, tmp_path):
    questions, given = answered(folder, "A")
    found = result(SEED, SEED.score(folder, questions, given), questions, given)
    assert found["missing"] == ["2", "3", "v4"]
    assert found["scores"]["total"] == 25
    [file] = SEED.upload(folder, questions, given, tmp_path)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"question_id": "1", "prediction": "A"},
        {"question_id": "2", "prediction": ""},
        {"question_id": "3", "prediction": ""},
        {"question_id": "v4", "prediction": ""},
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"answer": "D"', '"answer": "E"', "question v4 of .* has the answer 'E', but the options A, B, C, D"),
        ("SEED-Bench-video-image/", "frames/", "question v4 of .* must have one in SEED-Bench-image or SEED-Bench-video-image"),
    ],
)
def test_damaged_questions(folder, old, new, message):
    file = folder / "llava-seed-bench.jsonl"
    file.write_text(file.read_text().replace(old, new))
    questions, given = answered(folder)
    with pytest.raises(BenchmarkError, match=message):
        SEED.score(folder, questions, given)
