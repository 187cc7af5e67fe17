"""A data set in LLaVA's format from Tux Paint's stamps: captions, names, categories, colours, and yes/no questions about them.

The subject of a picture is the last word of its name ("apple" of "a Fuji apple"). Subjects are either trained on or tested, never both.

Each question of training is a record of its own. A conversation about a picture would give answers away (after "is this a bull?" yes),
and a model that is trained for minutes would learn from the text before it looks.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

# The folder of a picture -> its category. Folders that mix kinds of things have none.
CATEGORIES = {
    "animals": "animal",
    "food": "food",
    "plants": "plant",
    "vehicles": "vehicle",
    "clothes": "clothing",
    "household": "household object",
    "town/houses": "building",
}
CAPTION = re.compile(r"(An?) ([^.!?;:,—(]+)[.!]")
MOST_WORDS = 5  # of a name; longer captions are sentences about the thing
COLOURS = ("red", "green", "blue", "yellow", "orange", "white", "black", "brown", "pink", "purple", "grey", "gray", "silver", "gold")
CAPTION_REQUEST = "Describe the picture."
CATEGORY_QUESTION = "What kind of thing is this?"
WITHOUT_ARTICLE = ("food", "clothing")
NAME_QUESTION = "What is this?"
KINDS = ("random", "popular", "adversarial")  # of negatives, as in POPE (arXiv 2305.10355, section 4)
TESTED = 0.2  # share of the subjects
SIDE = 224  # pixels
# Variants of the pictures of a category that are trained on, about as many in each: the most frequent answer is then no good answer.
CATEGORY_SIZE = 200
FEWEST_VARIANTS = 2
SHARED_FOLDERS = 2  # parts of a folder that two pictures share if they are alike, as in animals/birds


@dataclass(frozen=True)
class Picture:
    """A picture with a name, such as "Fuji apple", and its article, in lower case. `folder`: where it was found."""

    file: Path
    folder: str
    article: str
    name: str

    @property
    def subject(self) -> str:
        return re.split(r" (?:of|with|in|on|from|for|to|at|and|that|which) ", self.name)[0].split()[-1].lower()

    @property
    def category(self) -> str | None:
        return next((category for folder, category in CATEGORIES.items() if f"{self.folder}/".startswith(f"{folder}/")), None)

    @property
    def phrase(self) -> str:
        return f"{self.article} {self.name}"

    @property
    def is_tested(self) -> bool:
        return int(sha256(self.subject.encode()).hexdigest(), 16) % 1000 < TESTED * 1000


def find_pictures(stamps: Path) -> list[Picture]:
    """Return the pictures whose caption is a name with an article, such as "A Fuji apple.", without letters and traffic signs."""
    found = []
    for text in sorted(stamps.rglob("*.txt")):
        folder, file = text.parent.relative_to(stamps).as_posix(), text.with_suffix(".png")
        caption = CAPTION.match(text.read_text(encoding="utf-8"))
        if caption and file.is_file() and not folder.startswith("symbols") and len(caption[2].split()) <= MOST_WORDS:
            name = caption[2].strip(" “”")
            found.append(Picture(file, folder, caption[1].lower(), name.replace("“", "").replace("”", "")))
    return found


def write_dataset(stamps: Path, out: Path) -> dict[str, int]:
    """Write the images, captions.json, names.json, kinds.json and existence.json to train on, test.json and test-without-images.json;
    return the numbers of pictures and records."""
    pictures = find_pictures(stamps)
    trained, tested = [[each for each in pictures if each.is_tested == flag] for flag in (False, True)]
    (out / "images").mkdir()
    sizes = Counter(picture.category for picture in trained)
    files: dict[str, list[dict[str, Any]]] = {"captions": [], "names": [], "kinds": [], "existence": [], "test": []}
    for number, picture in enumerate(trained):
        wanted = round(CATEGORY_SIZE / sizes[picture.category]) if picture.category else 0
        for variant in range(max(wanted, FEWEST_VARIANTS)):
            draw = random.Random(f"train {variant} {number}")
            image = _write_image(out, f"train-{number:03}-{variant}.png", picture.file, draw)
            for name, family, question, answer in _train_questions(picture, trained, draw):
                files[name].append(_record(f"{family}-{number}-{variant}", image, question, answer))
    for number, picture in enumerate(tested):
        image = _write_image(out, f"test-{number:03}.png", picture.file, None)
        files["test"] += _test_records(str(number), image, picture, tested)
    files["test-without-images"] = [{key: _blind(value) for key, value in each.items() if key != "image"} for each in files["test"]]
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"trained": len(trained), "tested": len(tested)} | {name: len(records) for name, records in files.items()}


def _write_image(out: Path, name: str, file: Path, draw: random.Random | None) -> str:
    """Write a picture on a square background, white in tests; in training mirrored, moved, and on a light colour, at random."""
    stamp = Image.open(file).convert("RGBA")
    colour = (255, 255, 255) if draw is None else tuple(draw.randint(200, 255) for _ in range(3))
    if draw is not None and draw.random() < 0.5:
        stamp = ImageOps.mirror(stamp)
    side = round(SIDE * (0.9 if draw is None else draw.uniform(0.65, 1)))
    stamp = ImageOps.contain(stamp, (side, side), Image.Resampling.BICUBIC)
    free = (SIDE - stamp.width, SIDE - stamp.height)
    place = [room // 2 if draw is None else draw.randint(0, room) for room in free]
    canvas = Image.new("RGBA", (SIDE, SIDE), (*colour, 255))
    canvas.alpha_composite(stamp, tuple(place))
    canvas.convert("RGB").save(out / "images" / name)
    return name


def _train_questions(picture: Picture, known: Sequence[Picture], draw: random.Random) -> list[tuple[str, str, str, str]]:
    """Return (file, family, question, answer). One yes/no question about the name and one about the category, each with a random answer: of
    both answers together, a model could learn that one of two questions about a picture is answered with no."""
    other = NEGATIVES[draw.choice(KINDS)](picture, known, draw)
    asked = [("captions", "caption", CAPTION_REQUEST, f"{picture.phrase[0].upper()}{picture.phrase[1:]}.")]
    asked += [("kinds" if each[0] == "category" else "names", *each) for each in _questions(picture)]
    asked.append(("existence", "name", *draw.choice([(_existence(picture), "yes"), (_existence(other), "no")])))
    if picture.category is not None:
        asked.append(("existence", "kind", *draw.choice(_kind_questions(picture.category, list(CATEGORIES.values()), draw))))
    return asked


def _test_records(number: str, image: str, picture: Picture, known: Sequence[Picture]) -> list[dict[str, Any]]:
    """Return one question in each record, with its family. The negatives are names of other tested pictures: whether a name was trained on
    would give the answer away."""
    asked = _questions(picture)
    if picture.category is not None:
        categories = [each.category for each in known if each.category is not None]  # asked about as often with no as with yes
        asked += [("kind", *each) for each in _kind_questions(picture.category, categories, random.Random(f"test {number} kind"))]
    for kind in KINDS:
        draw = random.Random(f"test {number} {kind}")
        asked += [(kind, _existence(picture), "yes"), (kind, _existence(NEGATIVES[kind](picture, known, draw)), "no")]
    metrics = {"name": "contains", "kind": "yes_no", **dict.fromkeys(KINDS, "yes_no")}
    return [
        _record(f"{family}-{number}-{place}", image, question, answer) | {"family": family, "metric": metrics.get(family, "exact")}
        for place, (family, question, answer) in enumerate(asked)
    ]


def _kind_questions(category: str, categories: Sequence[str], draw: random.Random) -> list[tuple[str, str]]:
    """Return (question, answer): one with yes, and one with no, about another category, drawn from `categories`."""
    other = draw.choice([each for each in categories if each != category])
    return [(_is_it(category), "yes"), (_is_it(other), "no")]


def _is_it(category: str) -> str:
    article = "" if category in WITHOUT_ARTICLE else "an " if category[0] in "aeiou" else "a "
    return f"Is this {article}{category}?"


def _existence(picture: Picture) -> str:
    return f"Is this {picture.phrase}?"


def _questions(picture: Picture) -> list[tuple[str, str, str]]:
    """Return (family, question, answer) for the name, the category if there is one, and the colour if the name begins with one."""
    asked = [("name", NAME_QUESTION, picture.name)]
    if picture.category is not None:
        asked.append(("category", CATEGORY_QUESTION, picture.category))
    colour, *rest = picture.name.split()
    if rest and colour.lower() in COLOURS:
        asked.append(("colour", f"What colour is the {' '.join(rest)}?", colour.lower()))
    return asked


def _random(picture: Picture, known: Sequence[Picture], draw: random.Random) -> Picture:
    return draw.choice([each for each in known if each.subject != picture.subject])


def _popular(picture: Picture, known: Sequence[Picture], draw: random.Random) -> Picture:
    """Draw from the pictures with the twenty most frequent subjects."""
    common = {subject for subject, _ in Counter(each.subject for each in known).most_common(20)}
    return draw.choice([each for each in known if each.subject in common - {picture.subject}])


def _adversarial(picture: Picture, known: Sequence[Picture], draw: random.Random) -> Picture:
    """Draw from the pictures of the same kind, by their folders; from all if there is none."""
    kind = picture.folder.split("/")[:SHARED_FOLDERS]
    alike = [each for each in known if each.folder.split("/")[:SHARED_FOLDERS] == kind and each.subject != picture.subject]
    return draw.choice(alike) if alike else _random(picture, known, draw)


NEGATIVES: dict[str, Callable[[Picture, Sequence[Picture], random.Random], Picture]] = dict(
    zip(KINDS, (_random, _popular, _adversarial), strict=True)
)


def _record(number: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": number, "image": image, "conversations": turns}


def _blind(value: Any) -> Any:
    """Return the conversations without their image."""
    if not isinstance(value, list):
        return value
    return [turn | {"value": turn["value"].removeprefix("<image>\n")} for turn in value]
