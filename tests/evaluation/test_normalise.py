"""Short answers are normalised as by the published code, step by step."""

import json

import pytest

from moe_llava.evaluation.score.normalise import annotators, evalai, leave_one_out, map_words, split_words, strip_punctuation, vqa
from moe_llava.evaluation.score.reading import BenchmarkError


def test_every_step_is_the_published_one(golden):
    cases = json.loads((golden / "eval" / "textvqa" / "expected_normalizer.json").read_text())
    assert len(cases) > 100
    for case in cases:
        found = {
            "input": case["input"],
            "call": evalai(case["input"]),
            "word_tokenize": split_words(case["input"]),
            "process_punctuation": strip_punctuation(case["input"]),
            "process_digit_article": map_words(case["input"]),
        }
        assert found == case


@pytest.mark.parametrize(
    ("text", "by_vqa", "by_evalai"),
    [
        ("  The Two dogs.\n", "2 dogs", "2 dogs"),
        ("John's", "john's", "john 's"),  # EvalAI takes a possessive apart
        ("a,b", "b", "ab"),  # and drops commas, where VQA makes a blank of one: then "a" is an article
        ("1,000 (or so)", "1000 or so", "1000 or so"),
        ("black/white", "black white", "black white"),
        ("black/ white", "black white", "black white"),
        ("dont", "don't", "don't"),
        ("YALLDVE yall'd've", "yalldve y'all'd've", "yalldve y'all'd've"),
        ("id've", "id've", "id've"),
        ("none\tof 'em", "0 of 'em", "0 of 'em"),
        ("", "", ""),
        ("?", "", ""),
        ("NO", "no", "no"),
        ("(A)", "", ""),
        ("Ünicode 日本", "ünicode 日本", "ünicode 日本"),
    ],
)
def test_vqa_and_evalai_differ_in_little(text, by_vqa, by_evalai):
    assert (vqa(text), evalai(text)) == (by_vqa, by_evalai)


def test_at_most_32_full_stops_vanish():
    assert vqa("a." * 40) == "a" * 32 + "a." * 8


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_out(matches, accuracy):
    """With two matches: eight annotators leave 2 of 3, two leave 1 of 3: (8 x 2/3 + 2 x 1/3) / 10."""
    assert leave_one_out("x", ["x"] * matches + ["y"] * (10 - matches)) == pytest.approx(accuracy, abs=1e-12)


def test_annotators():
    assert annotators({"answers": ["a", {"answer": "b", "answer_id": 2}]}, "here") == ["a", "b"]
    with pytest.raises(BenchmarkError, match="here has an empty list"):
        annotators({"answers": []}, "here")
    with pytest.raises(BenchmarkError, match="here must have a list of 'answers', but has yes"):
        annotators({"answers": "yes"}, "here")
