"""Perturbations that make questions harder and keep their answers: of the picture's quality or the question's wording, at strengths 1 to 5.

VALUES defines the strengths. Noise, blur, JPEG and brightness have the five severities of ImageNet-C (Hendrycks and Dietterich, arXiv
1903.12261); blur is in pixels of a picture with a shorter side of 224, and scaled to others. Occlusion covers a share of the picture, as in
Cutout (DeVries and Taylor, arXiv 1708.04552).

The change of a picture depends only on its pixels and the seed, that of a question on its id, its words and the seed. Each strength
continues the one below: the same noise, larger; the same typos, and more.

Only the question itself is changed: not `<image>`, and nothing from the first option, answer format or OCR token on. The wordings are
English, and typos and case change only Latin letters, so a text without Latin letters keeps both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from moe_llava.common.images import to_rgb
from moe_llava.common.messages import did_you_mean
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError

STRENGTHS = (1, 2, 3, 4, 5)
VALUES: dict[str, tuple[Any, ...]] = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, of the range of pixels
    "blur": (1, 2, 3, 4, 6),  # standard deviation, in pixels at 224
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV
    "occlusion": (0.05, 0.1, 0.2, 0.3, 0.4),  # share of the area
    "typos": (0.1, 0.2, 0.3, 0.4, 0.5),  # share of the words, rounded up
    "case": (0.1, 0.2, 0.3, 0.4, 0.5),  # share of the letters, rounded up
    "order": (0.1, 0.2, 0.3, 0.4, 0.5),  # share of the neighbouring pairs of words, rounded up
    "paraphrase": (
        "Please tell me: {}",
        "Look at the image and answer this question: {}",
        "I would like to know something about what is shown here. {}",
        "Here is a question that somebody asked about this, and that I could not answer myself: {} What do you say?",
        "Take your time, look closely at everything that can be seen, and do not guess. What I would like you to find out is this: {} "
        "Thank you for your help.",
    ),
    "distraction": (1, 2, 3, 4, 5),  # sentences
    "words": (0.1, 0.2, 0.3, 0.4, 0.5),  # share of the words, rounded up: the most that the attack may change
}

# Paraphrases from strength 3 on also use other words.
REWORDED_FROM = 3
REWORDINGS = (
    (r"^is there (an?) (.+?) \?$", r"can you see \1 \2 ?"),
    (r"^Is there (an? .+)\?$", r"Can you see \1?"),
    (r"^Are there any (.+)\?$", r"Can you see any \1?"),
    (r"^How many (.+?) are (?:there )?in the (image|picture|photo)\?$", r"What is the number of \1 in the \2?"),
    (r"^What colou?r is (the \w+)\?$", r"Which color does \1 have?"),
)

# They name nothing that occurs in benchmarks, and say nothing about a picture.
DISTRACTIONS = (
    "I had a long day yesterday.",
    "My neighbour likes to read in the evening.",
    "It rained a lot last week.",
    "The meeting was moved to Thursday.",
    "Somebody told me an old joke this morning.",
    "Next month I will start to learn Italian.",
    "The shop around the corner closes early.",
    "I should call my aunt more often.",
)

# The start of the instruction how to answer, or of the options.
KEPT = re.compile(
    r"^[ \t]*(?:\(?A[ \t]*[.):](?=\s|$)|Options:|Choices:|Reference OCR token|Answer (?:the question using|with|using|in)\b"
    r"|When the provided information|请直接回答)|Please answer yes or no",
    re.MULTILINE,
)
PLACEHOLDER = r"<image[^>]*>"
# A line: placeholders before the text, the text, blanks after it.
LINE = re.compile(rf"(\s*(?:{PLACEHOLDER}\s*)*)(.*?)(\s*)", re.DOTALL)
MISTYPED = re.compile(r"[A-Za-z]{3,}")  # words that typos change
LETTER = re.compile(r"[A-Za-z]")
WORD = re.compile(r"[^\W_]+(?:['\u2019.,-][^\W_]+)*")
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


@dataclass(frozen=True)
class Perturbation:
    """A kind of change at a strength; `seed` is that of its random choices. Raises BenchmarkError for an unknown name or strength."""

    name: str
    strength: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            guess = did_you_mean(self.name, KINDS, ".")
            raise BenchmarkError(f"no perturbation is called {self.name!r}{guess} There are {', '.join(KINDS)}")
        if self.strength not in STRENGTHS:
            raise BenchmarkError(f"the perturbation {self.name} has the strength {self.strength}, but it must be 1 to 5")

    def __str__(self) -> str:
        return f"{self.name}:{self.strength}"

    @property
    def kind(self) -> str:
        """visual, textual or adversarial"""
        return KINDS[self.name]

    @property
    def value(self) -> Any:
        """What VALUES has for it."""
        return VALUES[self.name][self.strength - 1]


def parse_perturbations(text: str) -> list[Perturbation]:
    """Parse a list such as `noise:3,typos`; without a strength, all five are meant. Raises BenchmarkError, naming the wrong piece."""
    found: list[Perturbation] = []
    for piece in text.split(","):
        name, colon, strength = (part.strip() for part in piece.partition(":"))
        if colon and not strength.isdecimal():
            raise BenchmarkError(f"the perturbation {piece.strip()!r} has the strength {strength!r}, but it must be 1 to 5")
        for perturbation in [Perturbation(name, int(strength))] if colon else [Perturbation(name, each) for each in STRENGTHS]:
            if perturbation in found:
                raise BenchmarkError(f"the perturbation {perturbation} is in {text!r} twice")
            found.append(perturbation)
    return found


def perturb_image(image: Image.Image, perturbation: Perturbation) -> Image.Image:
    """Return a decoded RGB image under a visual perturbation, and unchanged under others."""
    if perturbation.kind != "visual":
        return image
    pixels = hashlib.sha256(image.tobytes()).hexdigest()
    random = _random(perturbation.seed, perturbation.name, pixels)
    return VISUAL[perturbation.name](image, perturbation.value, random)


def perturb_question(question: Question, perturbation: Perturbation) -> Question:
    """Return a question with other words under a textual perturbation, and unchanged under others."""
    if perturbation.kind != "textual":
        return question
    text, rest = split_prompt(question.prompt)
    changed = TEXTUAL[perturbation.name](text, perturbation.value, random_of(question, perturbation))
    return dataclasses.replace(question, prompt=changed + rest)


def split_prompt(prompt: str) -> tuple[str, str]:
    """Return (what may be changed of a prompt, the rest)."""
    kept = KEPT.search(prompt)
    end = kept.start() if kept else len(prompt)
    return prompt[:end], prompt[end:]


def random_of(question: Question, perturbation: Perturbation) -> np.random.Generator:
    """Return the source of a question's random choices. Several questions may share an id if their prompts differ."""
    return _random(perturbation.seed, perturbation.name, question.id, question.prompt)


def _random(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _noise(image: Image.Image, deviation: float, random: np.random.Generator) -> Image.Image:
    pixels_HWC = np.asarray(image, np.float32)
    return _picture(pixels_HWC + 255 * deviation * random.standard_normal(pixels_HWC.shape, np.float32))


def _blur(image: Image.Image, deviation: float, random: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(deviation * min(image.size) / 224))


def _jpeg(image: Image.Image, quality: int, random: np.random.Generator) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return to_rgb(Image.open(file))


def _brightness(image: Image.Image, more: float, random: np.random.Generator) -> Image.Image:
    """Scale all channels by one factor, which keeps hue and saturation; black becomes grey."""
    pixels_HWC = np.asarray(image, np.float32)
    value_HW1 = pixels_HWC.max(axis=2, keepdims=True)
    bright_HW1 = np.minimum(value_HW1 + 255 * more, 255)
    return _picture(np.where(value_HW1 > 0, pixels_HWC * bright_HW1 / np.maximum(value_HW1, 1), bright_HW1))


def _occlusion(image: Image.Image, share: float, random: np.random.Generator) -> Image.Image:
    """Paste a grey rectangle of the picture's shape anywhere in it."""
    x, y = random.random(2)  # relative to the free room, so that larger rectangles mostly cover the smaller ones
    width, height = (max(1, round(side * math.sqrt(share))) for side in image.size)
    left, top = round(x * (image.width - width)), round(y * (image.height - height))
    covered = image.copy()
    covered.paste((127, 127, 127), (left, top, left + width, top + height))
    return covered


def _picture(pixels_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_HWC.round().clip(0, 255).astype(np.uint8))


def _typos(text: str, share: float, random: np.random.Generator) -> str:
    words = word_spans(text)
    draws = random.random((len(words), 2))
    chosen = {words[index]: draws[index] for index in _some(len(words), share, random)}
    return replaced(text, {span: typo(text[slice(*span)], *draw) for span, draw in chosen.items()})


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the spans of the words that may be mistyped."""
    return [match.span() for piece in _pieces(text) for match in MISTYPED.finditer(text, *piece)]


def typo(word: str, kind: float, place: float) -> str:
    """Leave out a letter, double it, swap it with the one before, or replace it by its neighbour on the keyboard; never the first one."""
    if kind < 0.25:
        at = 2 + int(place * (len(word) - 2))
        if word[at - 1] != word[at]:
            return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    at = 1 + int(place * (len(word) - 1))
    if kind < 0.5:
        return word[:at] + word[at] * 2 + word[at + 1 :]
    if kind < 0.75:
        return word[:at] + word[at + 1 :]
    row = next(row for row in KEYBOARD if word[at].lower() in row)
    column = row.index(word[at].lower())
    neighbour = row[column + 1 if column + 1 < len(row) else column - 1]
    return word[:at] + (neighbour.upper() if word[at].isupper() else neighbour) + word[at + 1 :]


def _case(text: str, share: float, random: np.random.Generator) -> str:
    letters = [match.span() for piece in _pieces(text) for match in LETTER.finditer(text, *piece)]
    chosen = [letters[index] for index in _some(len(letters), share, random)]
    return replaced(text, {span: text[slice(*span)].swapcase() for span in chosen})


def _order(text: str, share: float, random: np.random.Generator) -> str:
    """Swap neighbouring words, without what is between them, such as commas."""
    words = [[match.span() for match in WORD.finditer(text, *piece)] for piece in _pieces(text)]
    pairs = [pair for spans in words for pair in itertools.pairwise(spans)]
    placed = {span: text[slice(*span)] for spans in words for span in spans}
    for index in _some(len(pairs), share, random):
        first, second = pairs[index]
        placed[first], placed[second] = placed[second], placed[first]
    return replaced(text, placed)


def _paraphrase(text: str, frame: str, random: np.random.Generator) -> str:
    def change(text: str) -> str:
        if frame in VALUES["paraphrase"][REWORDED_FROM - 1 :]:
            for pattern, words in REWORDINGS:
                text = re.sub(pattern, words, text)
        return frame.format(text)

    return _on_question(text, change)


def _distraction(text: str, number: int, random: np.random.Generator) -> str:
    drawn = [DISTRACTIONS[index] for index in random.permutation(len(DISTRACTIONS))[:number]]
    return _on_question(text, lambda text: " ".join([*drawn, text]))


def _pieces(text: str) -> list[tuple[int, int]]:
    """Return the spans of the text between placeholders and line ends."""
    ends = [match.span() for match in re.finditer(rf"{PLACEHOLDER}|\n", text)]
    return list(zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(text)], strict=True))


def _some(number: int, share: float, random: np.random.Generator) -> np.ndarray:
    """Draw the indices of a share of `number` things. A larger share begins with the same ones."""
    return random.permutation(number)[: math.ceil(share * number)]


def replaced(text: str, by: Mapping[tuple[int, int], str]) -> str:
    """Return a text with other words at some spans."""
    for (start, end), words in sorted(by.items(), reverse=True):
        text = text[:start] + words + text[end:]
    return text


def _on_question(text: str, change: Callable[[str], str]) -> str:
    """Change the last line with text; the lines before it are context."""
    lines = text.split("\n")
    for number in reversed(range(len(lines))):
        before, words, after = LINE.fullmatch(lines[number]).groups()  # type: ignore[union-attr]
        if words:
            lines[number] = before + change(words) + after
            break
    return "\n".join(lines)


VISUAL: dict[str, Callable[[Image.Image, Any, np.random.Generator], Image.Image]]
VISUAL = {"noise": _noise, "blur": _blur, "jpeg": _jpeg, "brightness": _brightness, "occlusion": _occlusion}
TEXTUAL: dict[str, Callable[[str, Any, np.random.Generator], str]]
TEXTUAL = {"typos": _typos, "case": _case, "order": _order, "paraphrase": _paraphrase, "distraction": _distraction}
PIXEL_ATTACKS, WORD_ATTACK = ("fgsm", "pgd"), "words"  # in attack.py and words.py
ADVERSARIAL = (*PIXEL_ATTACKS, WORD_ATTACK)
KINDS = {**dict.fromkeys(VISUAL, "visual"), **dict.fromkeys(TEXTUAL, "textual"), **dict.fromkeys(ADVERSARIAL, "adversarial")}
