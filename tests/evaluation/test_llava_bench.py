"""LLaVA-Bench: marks of a judge on loopback, scores computed by hand."""

import json
import re

import pytest

from moe_llava.evaluation.score.definitions.llava_bench import read_marks
from moe_llava.evaluation.score.judge import JudgeError
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.scoring import judge_answers, score_answers
from tests.evaluation.judging_server import Told, serving

CATEGORIES = ["conv", "detail", "complex", "conv"]
GIVEN = {0: "a cat {x}", 1: "a dog", 2: "", 3: "Answer B:\n\t10 10"}
# What the judge says of each answer of ours: reference, ours.
MARKS = {"a cat {x}": "8 4", "a dog": "10, 5\nBecause it is short.", "": "**9 1**", "Answer B:\n\t10 10": "8 8"}


def write_lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "llava-bench-in-the-wild"
    questions = [
        {"question_id": number, "image": f"00{number // 2}.jpg", "category": category, "text": f"What is {number}?"}
        for number, category in enumerate(CATEGORIES)
    ]
    write_lines(folder / "questions.jsonl", questions)
    captions = ["A cat and a dog.", ["A house.", "A tree."]]
    write_lines(folder / "context.jsonl", [{"id": str(n), "image": f"00{n}.jpg", "caption": text} for n, text in enumerate(captions)])
    references = [{"question_id": number, "text": f"reference {number}"} for number in (3, 2, 1, 0)]
    write_lines(folder / "answers_gpt4.jsonl", references)
    answer(tmp_path, GIVEN)
    return tmp_path


def answer(data, given):
    write_lines(data / "answers.jsonl", [{"question_id": number, "text": text} for number, text in reversed(given.items())])


def mark(prompt, before):
    return Told(MARKS[re.search(r"Answer B:\n(.*)\n\nMark both", prompt, re.DOTALL)[1]])


def judged(data, url):
    return judge_answers("llava-bench", data, data / "answers.jsonl", url, "m")


def test_scores(data):
    with serving(mark) as server:
        found = judged(data, server.url)
        assert judged(data, server.url)["scores"] == found["scores"]
        assert len(server.requests) == 4
        prompt = next(prompt for prompt in server.prompts() if "What is 3?" in prompt)
    assert found["scores"] == pytest.approx({"all": 100 * 18 / 35, "conv": 100 * 12 / 16, "detail": 50.0, "complex": 100 / 9})
    # Of two pictures, a resample holds the first twice, both, or the second twice.
    assert found["intervals"]["all"] == pytest.approx((100 * 9 / 18, 100 * 9 / 17))
    # A resample that holds nothing of a category does not count for it.
    assert found["intervals"]["detail"] == pytest.approx((50, 50))
    assert found["missing"] == found["unknown"] == found["unreadable"] == []
    assert (found["judge"]["model"], found["judge"]["replies"]) == ("m", 4)
    assert re.search(r"A house\.\nA tree\..*What is 3\?.*Answer A:\nreference 3\n\nAnswer B:\nAnswer B:\n\t10 10\n", prompt, re.DOTALL)


def test_a_missing_answer_is_named_and_worth_nothing(data):
    answer(data, {number: GIVEN[number] for number in (0, 2, 3)})
    with serving(mark) as server:
        found = judged(data, server.url)
    assert len(server.requests) == 3
    assert found["missing"] == ["1"]
    assert found["scores"] == pytest.approx({"all": 100 * 13 / 35, "conv": 75.0, "detail": 0.0, "complex": 100 / 9})


def test_a_judgement_that_cannot_be_read_is_named_and_worth_nothing(data):
    with serving(lambda prompt, before: Told("Both are fine.") if "What is 0?" in prompt else mark(prompt, before)) as server:
        found = judged(data, server.url)
    assert len(server.requests) == 5
    assert found["unreadable"] == ["0"]
    assert found["scores"]["conv"] == pytest.approx(100 * 8 / 18)


@pytest.mark.parametrize(
    ("reply", "marks"),
    [
        ("7 8", (7, 8)),
        ("7.5,8\nA is short.", (7.5, 8)),
        ("  **10 , 1**.\r\n", (10, 1)),
        ("7\t8", (7, 8)),
        ("", None),
        ("7", None),
        ("8/10 9/10", None),
        ("8/10", None),
        ("A: 7, B: 8", None),
        ("7 8 9", None),
        ("0 8", None),
        ("7 11", None),
        ("-7 8", None),
        ("nan 8", None),
        ("78", None),
    ],
)
def test_reading(reply, marks):
    assert read_marks(reply) == marks


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("questions.jsonl", '"detail"', '"long"', "question 1 of .*questions.jsonl has the category 'long'"),
        ("context.jsonl", "001.jpg", "009.jpg", "question 2 of .* has no picture that context.jsonl describes"),
        ("context.jsonl", "caption", "text", "record 1 of .*context.jsonl has no 'caption'"),
        ("answers_gpt4.jsonl", '"question_id": 3', '"question_id": 4', "question 3 of .* has no answer in answers_gpt4.jsonl"),
    ],
)
def test_bad_files_are_told_before_the_judge_is_asked(data, file, old, new, message):
    path = data / "llava-bench-in-the-wild" / file
    path.write_text(path.read_text().replace(old, new))
    with serving(mark) as server, pytest.raises(BenchmarkError, match=message):
        judged(data, server.url)
    assert not server.requests


def test_without_a_judge(data):
    with pytest.raises(BenchmarkError, match=r"moe-llava judge llava-bench --data .* --answers .*answers.jsonl --endpoint URL"):
        score_answers("llava-bench", data, data / "answers.jsonl")
    with pytest.raises(BenchmarkError, match="POPE needs no judge: moe-llava score pope"):
        judge_answers("pope", data, data / "answers.jsonl", "http://localhost/v1", "m")
    with pytest.raises(JudgeError, match="base URL"):
        judged(data, "localhost")
