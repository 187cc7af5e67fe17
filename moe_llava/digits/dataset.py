"""Write the digits world as a LLaVA data set: PNG files and JSON files of conversations.

OUT/images/{train,test}/*.png
OUT/captions.json    stage I: each training image with its description
OUT/train.json       stages II and III: each training image with some questions and, last, its description
OUT/test.json        unseen handwriting; one question per record, with its family, kind and answer
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_llava.digits.questions import FAMILIES, NEGATIVE_KINDS, Question, ask_existence, sample_questions
from moe_llava.digits.scenes import Scene, Split, render, sample_scene

TRAIN_IMAGES = 16_000
TEST_IMAGES = 500
QUESTIONS_PER_IMAGE = 3


def write_dataset(
    out: Path, train_images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> None:
    """Write the data set into `out`; equal arguments write equal files. `advance` is called after each image."""
    rng = random.Random(seed)
    captions, train, test = [], [], []
    for index in range(train_images):
        scene, image = _draw(out, "train", index, rng)
        caption = Question("caption", "describe the image .", scene.caption)
        captions.append(_record(f"caption-{index}", image, [caption]))
        # The description comes last: before a question it would give the answer away.
        questions = [question for question in sample_questions(scene, rng, QUESTIONS_PER_IMAGE) if question != caption]
        train.append(_record(f"train-{index}", image, [*questions, caption]))
        advance()
    for index in range(test_images):
        scene, image = _draw(out, "test", index, rng)
        for number, question in enumerate(_test_questions(scene, rng)):
            test.append(_record(f"test-{index}-{number}", image, [question], family=question.family, kind=question.kind))
        advance()
    for name, records in (("captions", captions), ("train", train), ("test", test)):
        (out / f"{name}.json").write_text(json.dumps(records, indent=0) + "\n", encoding="utf-8")


def _draw(out: Path, split: Split, index: int, rng: random.Random) -> tuple[Scene, str]:
    """Draw a scene and save its picture; return scene and file name."""
    scene = sample_scene(rng)
    name = f"{split}/{index:06d}.png"
    path = out / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene, rng, split).save(path)
    return scene, name


def _test_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Return a question of every family that the scene allows; for existence, as in POPE, one positive and one of each negative kind."""
    questions = [ask_existence(scene, rng, kind) for kind in ("positive", *NEGATIVE_KINDS)]
    for family, ask in FAMILIES.items():
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
