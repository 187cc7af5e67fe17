"""Every question has its one right answer, recomputed here from the scene in another way."""

import random
import re

import pytest

from moe_llava.digits.questions import FAMILIES, HARD_FAMILIES, NEGATIVE_KINDS, ask_existence, sample_questions, vocabulary
from moe_llava.digits.scenes import COLOURS, HARD, STANDARD, Item, Scene, sample_scene
from moe_llava.digits.tokenizer import build_tokenizer

SCENE = Scene((Item(7, "red", 0), Item(3, "blue", 4), Item(3, "red", 8)))


# . 2 . .      The 2 is orange, the 9s are red and blue,
# 9 . 9 5      the 5 is cyan.
HARD_SCENE = Scene(tuple(Item(*item, HARD) for item in ((2, "orange", 1), (9, "red", 4), (9, "blue", 6), (5, "cyan", 7))))


def answers(family, number=300, scene=SCENE):
    rng = random.Random(1)
    drawn = (HARD_FAMILIES[family](scene, rng) for _ in range(number))
    return {question.text: question.answer for question in drawn if question}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("colour", {"what colour is the 7 ?": "red"}),
        (
            "digit",
            {
                "which digit is at the top-left ?": "7",
                "which digit is at the center ?": "3",
                "which digit is at the bottom-right ?": "3",
                "which digit is blue ?": "3",
            },
        ),
        ("position", {"where is the red 7 ?": "top-left", "where is the blue 3 ?": "center", "where is the red 3 ?": "bottom-right"}),
        (
            "relation",
            {
                "which digit is leftmost ?": "7",
                "which digit is rightmost ?": "3",
                "which digit is highest ?": "7",
                "which digit is lowest ?": "3",
            },
        ),
        ("comparison", {}),
        ("sum", {}),
        ("caption", {"describe the image .": "a red 7 at the top-left and a blue 3 at the center and a red 3 at the bottom-right"}),
    ],
)
def test_answers_to_a_scene(family, expected):
    assert answers(family) == expected


def test_counts():
    counts = answers("count")
    assert counts["how many digits are there ?"] == "3"
    assert counts["how many red digits are there ?"] == "2"
    assert counts["how many green digits are there ?"] == "0"


def test_two_colours_are_compared_and_added():
    rng = random.Random(0)
    scene = Scene((Item(7, "red", 0), Item(3, "blue", 4)))
    question = FAMILIES["comparison"](scene, rng)
    assert question.answer == "red"
    assert FAMILIES["sum"](scene, rng).answer == "10"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "neighbour",
            {
                "which digit is right of the red 9 ?": "9",  # the nearest, not the 5
                "which digit is left of the blue 9 ?": "9",
                "which digit is right of the blue 9 ?": "5",
                "which digit is left of the cyan 5 ?": "9",
            },
        ),
        ("extreme", {"what colour is the smallest digit ?": "orange"}),  # two are the largest
        ("larger", {f"how many digits are larger than {bound} ?": str((bound < 2) + (bound < 5) + 2) for bound in range(1, 9)}),
        (
            "position",
            {f"where is the {name} ?": at for name, at in {"orange 2": "b1", "red 9": "a2", "blue 9": "c2", "cyan 5": "d2"}.items()},
        ),
        ("caption", {"describe the image .": "a orange 2 at b1 and a red 9 at a2 and a blue 9 at c2 and a cyan 5 at d2"}),
    ],
)
def test_answers_to_a_hard_scene(family, expected):
    assert answers(family, scene=HARD_SCENE) == expected


def test_differences_of_a_hard_scene():
    found = answers("difference", scene=HARD_SCENE)
    assert found["what is the difference of the orange digit and the red digit ?"] == "7"
    assert found["what is the difference of the blue digit and the red digit ?"] == "0"
    assert len(found) == 12


def test_above_and_below():
    scene = Scene((Item(1, "red", 2, HARD), Item(3, "blue", 6, HARD), Item(7, "cyan", 14, HARD)))
    found = answers("neighbour", scene=scene)
    assert found["which digit is below the red 1 ?"] == "3"
    assert found["which digit is above the cyan 7 ?"] == "3"
    assert len(found) == 4


def test_existence_negatives_are_what_their_kind_says():
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        scene = sample_scene(rng)
        present = {(item.colour, item.digit) for item in scene.items}
        for kind in ("positive", *NEGATIVE_KINDS):
            question = ask_existence(scene, rng, kind)
            if question is None:
                assert kind == "adversarial"
                continue
            colour, digit = re.fullmatch(r"is there a (\w+) (\d) \?", question.text).groups()
            pair = (colour, int(digit))
            assert (question.answer == "yes") == (pair in present) == (kind == "positive")
            if kind == "popular":
                assert STANDARD.favourite_colour(pair[1]) == pair[0]
            if kind == "adversarial":
                assert any(pair[0] == item.colour for item in scene.items)
                assert any(pair[1] == item.digit for item in scene.items)
            seen.add(kind)
    assert seen == {"positive", *NEGATIVE_KINDS}


def test_half_of_the_existence_questions_are_to_be_affirmed():
    rng = random.Random(0)
    asked = [question.answer for _ in range(2000) if (question := ask_existence(sample_scene(rng), rng))]
    assert 0.45 < asked.count("yes") / len(asked) < 0.6


def test_questions_about_a_scene_differ_and_cover_the_families():
    rng = random.Random(0)
    families = set()
    for _ in range(100):
        questions = sample_questions(sample_scene(rng), rng, 6)
        assert len({question.text for question in questions}) == len(questions) == 6
        families |= {question.family for question in questions}
    assert families == set(FAMILIES)


@pytest.mark.parametrize("level", [STANDARD, HARD], ids=lambda level: level.name)
def test_the_vocabulary_holds_every_word(level):
    rng = random.Random(0)
    words, families = set(vocabulary(level)), set()
    for _ in range(300):
        for question in sample_questions(sample_scene(rng, level), rng, 9):
            assert set(question.text.split()) | set(question.answer.split()) <= words
            families.add(question.family)
    assert set(COLOURS) <= words
    assert families == set(HARD_FAMILIES if level == HARD else FAMILIES)


def test_tokenizer_round_trip_and_forgiving_input():
    tokenizer = build_tokenizer()
    text = "where is the red 7 ?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("Where is the red 7?") == tokenizer.encode(text)
    assert tokenizer.encode("zebra") == [tokenizer.unk_token_id]
    assert len(tokenizer) <= 90
