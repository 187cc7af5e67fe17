"""Points of answers by each metric, worked by hand."""

import pytest

from moe_llava.evaluation.score.metrics import METRICS, find_metric
from moe_llava.evaluation.score.reading import BenchmarkError

LETTERED = "Which colour?\nA. red\nB. dark red\nC. blue\nAnswer with the option's letter from the given choices directly."
IN_BRACKETS = "<image>\nWhich colour?\n(A) red\n(B) dark red\n(C) blue"


def points(name, expected, given, question="What?"):
    metric = METRICS[name]
    read = metric.read(given, question)
    return 0.0 if read is None else metric.points(read, metric.read(expected, question))


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("red", "red", True),
        ("red", " Red.\n", True),
        ("red", "the red", True),  # articles, number words, contractions: as VQA's script
        ("2", "two", True),
        ("none", "0", True),
        ("can't", "cant", True),
        ("dark red", "dark-red", True),
        ("1000", "1,000", True),
        ("3.5", "3.5", True),
        ("3.5", "35", False),
        ("red", "dark red", False),
        ("red", "reddish", False),
        ("red", "", False),
        ("A", "a.", True),  # VQA's normalisation alone would drop it as an article, and take all of these for equal
        ("A", "B", False),
        ("A", "the", False),
        ("A", "", False),
        ("?", "?", True),
        ("?", "!", False),
        ("红色", "红色 ", True),
    ],
)
def test_exact(expected, given, right):
    assert points("exact", expected, given) == right


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("red", "It is a red car.", True),
        ("Dark red", "It is the dark red one", True),
        ("red", "It is coloured", False),  # whole words only
        ("two", "I see 2 dogs", True),
        ("2", "I see 12 dogs", False),
        ("5", "2.5 metres", False),
        ("红", "一辆红色的车", True),
        ("a.b", "axb", False),
        ("red", "", False),
    ],
)
def test_contains(expected, given, right):
    assert points("contains", expected, given) == right


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("yes", "Yes, there is a dog.", True),
        ("No", "no", True),
        ("No.", "There isn't any", True),
        ("no", "NO", True),
        ("yes", "There is a dog", False),  # says neither
        ("no", "There is a dog", False),
        ("no", "yes and no", False),
    ],
)
def test_yes_no(expected, given, right):
    assert points("yes_no", expected, given) == right


@pytest.mark.parametrize("question", [LETTERED, IN_BRACKETS])
@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("B", "B", True),
        ("B.", "(b)", True),
        ("B", "The answer is B.", True),
        ("B", "dark red", True),
        ("dark red", "B", True),
        ("A", "It is dark red", False),
        ("C", "A or C", False),
        ("C", "D", False),
        ("C", "", False),
    ],
)
def test_choice(question, expected, given, right):
    assert points("choice", expected, given, question) == right


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("3", "There are three dogs and 2 cats", True),
        ("3", "3.0", True),
        ("three", "3", True),
        ("1000", "about 1,000 people", True),
        ("1234567", "1,234,567", True),
        ("-5", "It is -5 degrees", True),
        ("5", "-5", False),
        ("10", "10-20", True),
        ("0", "none", True),
        (".5", "0.5", True),
        ("12 apples", "12", True),
        ("4", "A4 paper", False),
        ("2", "The 3 of 2", False),  # only the first counts
        ("10", "tens", False),
        ("3", "several", False),
        ("3", "", False),
        ("5", "5%", True),
        ("5", "I see 5.", True),
    ],
)
def test_number(expected, given, right):
    assert points("number", expected, given) == right


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [
        ("a red car", "The red car!", 1.0),
        ("red car", "red bus", 0.5),
        ("red car", "red", pytest.approx(2 / 3)),  # precision 1, recall 1/2
        ("red", "red red red", 0.5),  # a word counts as often as it is expected
        ("red car", "blue bus", 0.0),
        ("red car", "", 0.0),
    ],
)
def test_word_f1(expected, given, score):
    assert points("word_f1", expected, given) == score


@pytest.mark.parametrize(
    ("name", "answer"), [("yes_no", "blue"), ("number", "blue"), ("choice", "D"), ("choice", "green"), ("choice", "A or B")]
)
def test_what_a_metric_cannot_judge(name, answer):
    assert METRICS[name].read(answer, LETTERED) is None
    assert METRICS["choice"].read("A", "Which colour?") is None


def test_an_unknown_metric():
    with pytest.raises(BenchmarkError, match=r"--metric is 'exat'; did you mean exact\? There are exact, contains, yes_no, choice, number"):
        find_metric("exat", "--metric")
    with pytest.raises(BenchmarkError, match=r"--metric is \['exact'\]"):
        find_metric(["exact"], "--metric")
