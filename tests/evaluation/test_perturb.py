"""Perturbations change only what they should, the same for the same question and seed, and more with each strength."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from moe_llava.evaluation.score.questions import LETTER, SINGLE_WORD, Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress.perturb import (
    ADVERSARIAL,
    KINDS,
    STRENGTHS,
    TEXTUAL,
    VALUES,
    VISUAL,
    Perturbation,
    parse_perturbations,
    perturb_image,
    perturb_question,
)
from tests.conftest import REPOSITORY

ASKED = "What colour has the small boat in front of the old harbour, and how many people sit in it?"
OPTIONS = "\nA. red, three of them\nB. dark blue\nC. white"


def picture(width=224, height=300):
    """Return an image with waves of all colours, neither black nor white."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 80 * np.sin(x / 9), 127 + 80 * np.cos(y / 7), 100 + 60 * np.sin((x + y) / 23)]
    return Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))


def changed(name, strength, image=None, seed=0):
    image = image or picture()
    perturbation = Perturbation(name, strength, seed)
    found = perturb_image(image, perturbation)
    question = Question("7", ASKED)
    assert perturb_question(question, perturbation) is question
    assert (found.mode, found.size) == ("RGB", image.size)
    return np.asarray(found, float)


def reworded(name, strength, prompt=ASKED, identity="7", seed=0):
    image, perturbation = picture(8, 8), Perturbation(name, strength, seed)
    question = perturb_question(Question(identity, prompt, extra={"category": 1}), perturbation)
    assert perturb_image(image, perturbation) is image
    assert (question.id, question.extra) == (identity, {"category": 1})
    return question.prompt


@pytest.mark.parametrize("name", VISUAL)
def test_pictures_get_worse_with_strength(name):
    clean = np.asarray(picture(), float)
    distances = [np.abs(changed(name, strength) - clean).mean() for strength in STRENGTHS]
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert distances[4] > 1.5 * distances[0]


@pytest.mark.parametrize("name", [*VISUAL, *TEXTUAL])
def test_the_same_for_the_same_picture_or_question_and_seed(name):
    act = changed if name in VISUAL else reworded
    assert np.array_equal(act(name, 3), act(name, 3))
    if name not in ("blur", "jpeg", "brightness", "paraphrase"):  # which draw nothing
        assert not np.array_equal(act(name, 3), act(name, 3, seed=1))


def test_two_pictures_or_questions_are_not_changed_alike():
    darker = picture().point(lambda level: level - 1)
    noise, more = (changed("noise", 1, image) - np.asarray(image, float) for image in (picture(), darker))
    assert not np.array_equal(noise, more)
    assert reworded("typos", 3) != reworded("typos", 3, identity="8")


@pytest.mark.parametrize("strength", STRENGTHS)
def test_noise_and_occlusion_have_their_values(strength):
    grey = Image.new("RGB", (200, 100), (127, 127, 127))
    # Up to a third of a range of noise, clipping takes less than it shows.
    if strength < 4:
        assert changed("noise", strength, grey).std() / 255 == pytest.approx(VALUES["noise"][strength - 1], rel=0.03)
    white = Image.new("RGB", (200, 100), (255, 255, 255))
    covered = (changed("occlusion", strength, white) == 127).all(axis=2)
    assert covered.mean() == pytest.approx(VALUES["occlusion"][strength - 1], rel=0.05)
    rows, columns = covered.any(axis=1).sum(), covered.any(axis=0).sum()
    assert covered.sum() == rows * columns


def test_brightness_keeps_hue():
    image = Image.new("RGB", (2, 1), (100, 50, 0))
    image.putpixel((1, 0), (0, 0, 0))
    found = changed("brightness", 2, image)
    assert found[0, 0].tolist() == [151, 76, 0]  # 100 + 0.2 of 255, and the half of it
    assert found[0, 1].tolist() == [51, 51, 51]
    assert changed("brightness", 5, Image.new("RGB", (1, 1), (200, 100, 0)))[0, 0].tolist() == [255, 128, 0]


def test_blur_is_of_the_pictures_size():
    """A small picture gets the same blur as a large one that is then made small."""
    large = changed("blur", 3, picture(448, 448))
    small = changed("blur", 3, picture(448, 448).resize((112, 112), Image.Resampling.BOX))
    shrunk = np.asarray(Image.fromarray(large.astype(np.uint8)).resize((112, 112), Image.Resampling.BOX), float)
    assert np.abs(shrunk - small).mean() < 2


@pytest.mark.parametrize(
    "suffix", [SINGLE_WORD, OPTIONS + LETTER, "\nReference OCR token: ABC, DEF" + SINGLE_WORD, " Please answer yes or no."]
)
@pytest.mark.parametrize("name", TEXTUAL)
def test_only_what_asks_is_changed(name, suffix):
    vizwiz = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    for strength in STRENGTHS:
        for tail in (suffix, vizwiz + suffix):
            head = "<image>\nHint: a day in May.\nThere is <image 2>, too. " + ASKED
            found = reworded(name, strength, head + tail)
            assert found.endswith(tail)
            assert found.startswith("<image>\n")
            assert re.findall("<.*?>", found) == ["<image>", "<image 2>"]
            assert found.count("\n") == 2 + tail.count("\n")
            assert found != head + tail


def test_typos_grow():
    words = ASKED.split()
    wrong = [{n for n, word in enumerate(reworded("typos", strength).split()) if word != words[n]} for strength in STRENGTHS]
    assert [len(places) for places in wrong] == [2, 3, 5, 6, 8]  # of 15 words of three letters or more, rounded up
    assert all(a < b for a, b in itertools.pairwise(wrong))


def test_typos_leave_the_first_letter():
    for seed in range(50):
        found = reworded("typos", 5, seed=seed).split()
        assert [word[0] for word in found] == [word[0] for word in ASKED.split()]
        assert all(abs(len(a) - len(b)) <= 1 for a, b in zip(found, ASKED.split(), strict=True))


def test_case_and_order_keep_letters_and_words():
    letters = sum(letter.isalpha() for letter in ASKED)
    for strength in STRENGTHS:
        found = reworded("case", strength)
        assert found.lower() == ASKED.lower()
        assert sum(a != b for a, b in zip(found, ASKED, strict=True)) == -(-letters * strength // 10)
        moved = reworded("order", strength)
        assert moved != ASKED
        assert sorted(re.findall(r"\w+", moved)) == sorted(re.findall(r"\w+", ASKED))
        assert re.sub(r"\w+", "", moved) == re.sub(r"\w+", "", ASKED)


def test_paraphrase_and_distraction_keep_the_question():
    for strength in STRENGTHS:
        assert ASKED in reworded("paraphrase", strength)
        found = reworded("distraction", strength)
        assert found.endswith(". " + ASKED)
        assert found.removesuffix(ASKED).count(".") == strength
        assert found.startswith(reworded("distraction", max(1, strength - 1)).removesuffix(ASKED))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("Is there an apple in the image?", "Can you see an apple in the image?"),
        ("is there a red 7 ?", "can you see a red 7 ?"),
        ("Are there any dogs in the image?", "Can you see any dogs in the image?"),
        ("How many dogs are there in the picture?", "What is the number of dogs in the picture?"),
        ("How many dogs are in the image?", "What is the number of dogs in the image?"),
        ("What color is the car?", "Which color does the car have?"),
        ("Why {0} and \\1?", "Why {0} and \\1?"),
    ],
)
def test_rewordings(asked, words):
    assert reworded("paraphrase", 3, "<image>\n" + asked).endswith(words)
    assert asked in reworded("paraphrase", 2, "<image>\n" + asked)


@pytest.mark.parametrize(
    "prompt",
    ["", "<image>", " \n", "<image>\nA. a\nB. b" + LETTER, "A.\nB. word" + LETTER, "(A) word\n(B) word" + LETTER, SINGLE_WORD, "7 ?"],
)
@pytest.mark.parametrize("name", ["typos", "case", "order"])
def test_nothing_to_change(name, prompt):
    assert reworded(name, 5, prompt) == prompt


def test_parse():
    assert list(map(str, parse_perturbations("noise:3, typos:2,pgd:1"))) == ["noise:3", "typos:2", "pgd:1"]
    assert parse_perturbations("blur") == [Perturbation("blur", strength) for strength in STRENGTHS]
    assert set(KINDS) == {*VALUES, *ADVERSARIAL}
    assert all(len(values) == 5 for values in VALUES.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no perturbation is called ''"),
        ("noise:", "'noise:' has the strength '', but"),
        ("noise:3,", "no perturbation is called ''"),
        ("noise:6", "noise has the strength 6, but it must be 1 to 5"),
        ("noise:-1", "strength '-1'"),
        ("noise:x", "strength 'x'"),
        ("noize:3", "no perturbation is called 'noize'; did you mean noise"),
        ("noise:3,noise:3", "noise:3 is in 'noise:3,noise:3' twice"),
        ("noise:3,noise", "noise:3 is in 'noise:3,noise' twice"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(BenchmarkError, match=message):
        parse_perturbations(text)


def test_the_document_has_the_values():
    text = (REPOSITORY / "docs" / "robustness.md").read_text(encoding="utf-8")
    for name, values in VALUES.items():
        (row,) = re.findall(rf"^\| `{name}`: .*?((?: \| [\d.]+){{5}}) \|$", text, re.MULTILINE)
        assert [float(value) for value in row.split("|")[1:]] == list(STRENGTHS if name == "paraphrase" else values)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_attacks_need_a_model(name):
    """An attack changes neither words nor decoded pictures."""
    question, image = Question("7", ASKED), picture(8, 8)
    assert perturb_question(question, Perturbation(name, 1)) is question
    assert perturb_image(image, Perturbation(name, 1)) is image
