"""Write the digits world as a LLaVA data set: PNG files and JSON files of conversations.

OUT/images/{train,fresh,test}/*.png
OUT/captions.json    stage I: each training image with its description
OUT/train.json       stages II and III: each training image with some questions and, last, its description
OUT/fresh.json       like train.json, of other scenes, for a stage III that sees nothing again; only if asked for
OUT/test.json        unseen handwriting; one question per record, with its family, kind and answer
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_llava.digits.questions import NEGATIVE_KINDS, Question, ask_existence, families, sample_questions
from moe_llava.digits.scenes import STANDARD, Level, Scene, render, sample_scene

TRAIN_IMAGES = 16_000
TEST_IMAGES = 500
QUESTIONS_PER_IMAGE = 3


def write_dataset(
    out: Path,
    train_images: int = TRAIN_IMAGES,
    test_images: int = TEST_IMAGES,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    level: Level = STANDARD,
    fresh_images: int = 0,
) -> None:
    """Write the data set of a level into `out`; equal arguments write equal files. `advance` is called after each image.

    No scene of `fresh_images` is a scene of the training images, and their number changes no other file.
    """
    rng = random.Random(seed)
    captions, train, test = [], [], []
    seen = set()
    for index in range(train_images):
        scene = sample_scene(rng, level)
        seen.add(scene)
        image = _picture(out, "train", index, scene, rng)
        caption = Question("caption", "describe the image .", scene.caption)
        captions.append(_record(f"caption-{index}", image, [caption]))
        train.append(_training_record(f"train-{index}", image, scene, rng))
        advance()
    for index in range(test_images):
        scene = sample_scene(rng, level)
        image = _picture(out, "test", index, scene, rng)
        for number, question in enumerate(_test_questions(scene, rng)):
            test.append(_record(f"test-{index}-{number}", image, [question], family=question.family, kind=question.kind))
        advance()
    files = {"captions": captions, "train": train, "test": test}
    if fresh_images:
        files["fresh"] = _fresh_records(out, fresh_images, random.Random(f"fresh {seed}"), level, seen, advance)
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records, indent=0) + "\n", encoding="utf-8")


def _fresh_records(
    out: Path, number: int, rng: random.Random, level: Level, seen: set[Scene], advance: Callable[[], None]
) -> list[dict[str, Any]]:
    records = []
    for index in range(number):
        scene = next(scene for scene in iter(lambda: sample_scene(rng, level), None) if scene not in seen)
        records.append(_training_record(f"fresh-{index}", _picture(out, "fresh", index, scene, rng), scene, rng))
        advance()
    return records


def _picture(out: Path, folder: str, index: int, scene: Scene, rng: random.Random) -> str:
    """Save the picture of a scene, with handwriting for training unless the folder is "test"; return its file name."""
    name = f"{folder}/{index:06d}.png"
    path = out / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene, rng, "test" if folder == "test" else "train").save(path)
    return name


def _training_record(identifier: str, image: str, scene: Scene, rng: random.Random) -> dict[str, Any]:
    caption = Question("caption", "describe the image .", scene.caption)
    # The description comes last: before a question it would give the answer away.
    questions = [question for question in sample_questions(scene, rng, QUESTIONS_PER_IMAGE) if question != caption]
    return _record(identifier, image, [*questions, caption])


def _test_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Return a question of every family that the scene allows; for existence, as in POPE, one positive and one of each negative kind."""
    questions = [ask_existence(scene, rng, kind) for kind in ("positive", *NEGATIVE_KINDS)]
    for family, ask in families(scene.level).items():
        if family != "existence":
            # A family has several wordings, and not every scene allows every one.
            drawn = (ask(scene, rng) for _ in range(20))
            questions.append(next((question for question in drawn if question is not None), None))
    return [question for question in questions if question is not None]


def _record(identifier: str, image: str, questions: list[Question], **extra: Any) -> dict[str, Any]:
    conversations = []
    for number, question in enumerate(questions):
        prompt = question.text if number else f"<image>\n{question.text}"
        conversations += [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answer}]
    return {"id": identifier, "image": image, "conversations": conversations, **extra}
