"""Make questions as in POPE (Li et al., arXiv 2305.10355) for any annotated pictures.

Each picture gets as many questions about objects that it shows as about absent ones: three, or fewer if it shows fewer, or if fewer are
absent. Absent objects are chosen in three ways: `random`; `popular`, the objects that most pictures of the whole set show; `adversarial`,
for each shown object the one that most often comes with it. As in the published questions, the shown objects are the same in all three.

Ties go to the more frequent object, then by name. If the published script runs out of objects that ever came with one, it draws any; here
the order goes on to objects that never did. The script counts over the drawn pictures; here, as in the paper, over the whole set.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_llava.common.files import new_folder
from moe_llava.evaluation.score.definitions.pope import CATEGORIES, QUESTIONS
from moe_llava.evaluation.score.questions import SINGLE_WORD
from moe_llava.evaluation.score.reading import BenchmarkError, numbered, once, read_json, read_json_lines, take, take_list, take_text

IMAGES = "val2014"  # the folder of POPE's pictures
OBJECTS = 3  # shown objects per picture, at most, and as many absent ones
Annotation = dict[str, list[str]]  # image -> the objects that it shows, each once


def write_pope_questions(annotations: Path, out: Path, images: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Write the files for `score pope` into the new folder `out`. Return the number of `images` with questions, of `questions` per way of
    choosing, and of the pictures `left_out` for each reason.

    Args:
        annotations: COCO's instances as JSON, or JSON lines of image and objects.
        images: how many to draw; None for all usable ones.

    Raises BenchmarkError for a wrong annotation, or if too few pictures are usable.
    """
    shown = read_annotations(annotations)
    sets, left_out = pope_questions(shown, annotations, images, seed)
    with new_folder(out) as folder:
        (folder / "coco").mkdir()
        questions: list[dict[str, Any]] = []
        # LLaVA's file has this order.
        for category in sorted(sets):
            labels = [{"question_id": number, **record} for number, record in enumerate(sets[category], start=1)]
            # The score identifies a label's picture by its file name alone.
            _write(folder / "coco" / f"coco_pope_{category}.json", [label | {"image": Path(label["image"]).name} for label in labels])
            for record in sets[category]:
                text = record["text"] + SINGLE_WORD
                questions.append({"question_id": len(questions) + 1, "image": record["image"], "text": text, "category": category})
        _write(folder / QUESTIONS, questions)
    records = sets[CATEGORIES[0]]
    return {"images": len({record["image"] for record in records}), "questions": len(records), "left_out": left_out}


def pope_questions(
    shown: Annotation, source: Path, images: int | None, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Return (way of choosing -> records of image, text, label; reason -> how many pictures were left out for it)."""
    frequency = Counter(item for items in shown.values() for item in items)
    together: dict[str, Counter[str]] = {}  # object -> other object -> how many pictures show both
    for items in shown.values():
        for item in items:
            together.setdefault(item, Counter()).update(other for other in items if other != item)
    empty = [image for image, items in shown.items() if not items]
    full = [image for image, items in shown.items() if items and len(items) == len(frequency)]
    usable = [image for image, items in shown.items() if 0 < len(items) < len(frequency)]
    if len(usable) < (images or 1):
        raise BenchmarkError(
            f"{source} has {len(usable)} usable pictures, but must have at least {images or 1}. A picture is usable if it "
            f"shows at least one of the set's {len(frequency)} objects, and at least one is absent: {len(empty)} of {len(shown)} pictures "
            f"show none, {len(full)} show all"
        )
    rng = random.Random(seed)
    sets: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
    for image in usable if images is None else rng.sample(usable, images):
        absent = sorted(set(frequency) - set(shown[image]))
        number = min(OBJECTS, len(shown[image]), len(absent))
        there = rng.sample(sorted(shown[image]), number)
        not_there = {
            "random": rng.sample(absent, number),
            "popular": sorted(absent, key=lambda item: -frequency[item])[:number],
            "adversarial": _adversarial(there, absent, together, frequency),
        }
        for category, negatives in not_there.items():
            for positive, negative in zip(there, negatives, strict=True):
                sets[category] += [_record(image, positive, "yes"), _record(image, negative, "no")]
    return sets, {"no objects": len(empty), "all objects of the set": len(full), "not drawn": 0 if images is None else len(usable) - images}


def _adversarial(there: list[str], absent: list[str], together: dict[str, Counter[str]], frequency: Counter[str]) -> list[str]:
    chosen: list[str] = []
    for item in there:
        with_it = together[item]
        left = [other for other in absent if other not in chosen]
        # `absent` is sorted, and max returns the first of equals.
        chosen.append(max(left, key=lambda other: (with_it[other], frequency[other])))
    return chosen


def _record(image: str, item: str, label: str) -> dict[str, Any]:
    article = "an" if item[0].lower() in "aeiou" else "a"
    return {"image": image, "text": f"Is there {article} {item} in the image?", "label": label}


def _write(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read_annotations(file: Path) -> Annotation:
    """Return the objects of each picture. Raises BenchmarkError, naming the place, if the file has neither of the two schemas."""
    shown = _read_coco(file)
    shown = _read_lines(file) if shown is None else shown
    if not shown:
        raise BenchmarkError(f"{file} names no pictures")
    names: dict[str, str] = {}
    for image in shown:
        other = names.setdefault(Path(image).name, image)
        if other != image:
            raise BenchmarkError(f"{file} has the pictures {other} and {image}: file names must be unique, because labels have only these")
    return shown


def _read_coco(file: Path) -> Annotation | None:
    """Read COCO's schema; None if the file is not one JSON object with annotations."""
    try:
        content = read_json(file)
    except BenchmarkError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return None
        raise
    if not isinstance(content, dict) or "annotations" not in content:
        return None
    categories, images, annotations = (take_list(content, key, str(file)) for key in ("categories", "images", "annotations"))
    names = {
        _identity(category, "id", where): _object(take(category, "name", where), where)
        for where, category in numbered(categories, "category", file, "id", start=0)
    }
    shown: dict[Any, dict[str, None]] = {}  # image id -> objects in their order, once each
    files = {}
    seen: dict[Any, str] = {}
    for where, image in numbered(images, "image", file, "id", start=0):
        identity = _identity(image, "id", where)
        files[identity], shown[identity] = _picture(image, "file_name", where), {}
        once(seen, "file_name", files[identity], where)
    for where, annotation in numbered(annotations, "annotation", file, start=0):
        image, category = _identity(annotation, "image_id", where), _identity(annotation, "category_id", where)
        if image not in shown or category not in names:
            raise BenchmarkError(f"{where} has image_id {image} and category_id {category}, but one of them is not in the file")
        shown[image][names[category]] = None
    return {files[image]: list(items) for image, items in shown.items()}


def _identity(record: dict[str, Any], key: str, where: str) -> int | str:
    value = take(record, key, where)
    if not isinstance(value, int | str):
        raise BenchmarkError(f"{where} must have a number or a string as {key!r}, but has {str(value)[:60]}")
    return value


def _picture(record: dict[str, Any], key: str, where: str) -> str:
    name = take_text(record, key, where)
    if not Path(name).name:
        raise BenchmarkError(f"{where} must have a file name as {key!r}, but has {name!r}")
    return name


def _read_lines(file: Path) -> Annotation:
    return {
        _picture(record, "image", where): list(dict.fromkeys(_object(item, where) for item in take_list(record, "objects", where)))
        for where, record in numbered(read_json_lines(file), "record", file, "image")
    }


def _object(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise BenchmarkError(f"{where} has the object {name!r}, but an object must be a word")
    return " ".join(name.split())
