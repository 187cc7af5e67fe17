"""Reading an option's letter leniently: whatever names exactly one option."""

import pytest

from moe_llava.evaluation.score.choices import lettered, options_in, read_leniently

COLOURS = ["red", "dark red", "None", "NA"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" b\n", "B"),
        ("(C)", "C"),
        ("__D__", "D"),
        ("\uff21", "A"),
        ("E", None),
        ("A. red", "A"),
        ("B: dark red", "B"),
        ("(b) because it is", "B"),
        ("C - not there", "C"),
        ("A, B", None),
        ("A and B", None),
        ("The answer is A", "A"),
        ("the correct answer is (b).", "B"),
        ("Answer: option C", "C"),
        ("The answer is A or B.", None),
        ("The answer is B. No, the answer is F.", None),
        ("The answer is a dog", None),
        ("I choose option D because", "D"),
        ("答案是B。", "B"),
        ("选A", "A"),
        ("None", "C"),
        ("na", "D"),
        ("Red!", "A"),
        ("The answer is red", "A"),
        ("It is dark red.", "B"),
        ("red, not dark red", None),
        ("nothing", None),
        ("null", None),
        ("", None),
        ("\t\n", None),
        ("\x00\ufffd🙂", None),
    ],
)
def test_lenient_reading(text, letter):
    assert read_leniently(text, lettered(COLOURS)) == letter


@pytest.mark.parametrize(("text", "letter"), [("5", "A"), ("-5", "B"), ("It is -5.", "B"), ("About 2.5", None), ("5 or -5", None)])
def test_numbers(text, letter):
    assert read_leniently(text, lettered(["5", "-5", "2"])) == letter


def test_chinese_options():
    assert read_leniently("图中是红色的", lettered(["红色", "蓝色"])) == "A"


def test_options_of_equal_text_are_not_told_apart():
    assert read_leniently("red", lettered(["red", "Red"])) is None


def test_options_in_a_prompt():
    assert options_in("Context: A. Lincoln\nWho?\nA. x\nB. \nC. y. z\nAnswer with the letter") == {"A": "x", "B": "", "C": "y. z"}
