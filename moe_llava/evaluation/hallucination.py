"""Questions as in POPE (Li et al., arXiv 2305.10355), of any pictures of which it is known what they show.

Of each picture, as many objects are asked for that it shows as objects that it does not show: three. What is not there is chosen in three
ways: `random`; `popular`, the objects that the most pictures of the whole set show; `adversarial`, for each of the three that are there the
object that most often comes with it. As in the published questions, the three that are there are the same in all three ways.

Ties go to the more frequent object, then by name. Where the published script runs out of objects that ever came with one, it draws any;
here the order just goes on, to objects that never did. It counts over the pictures drawn; here, as the paper has it, over the whole set.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_llava.checkpoints.folders import new_folder
from moe_llava.evaluation.benchmark import ENCODING, SINGLE_WORD, BenchmarkError, read_json_lines, take
from moe_llava.evaluation.benchmarks.pope import CATEGORIES, QUESTIONS

IMAGES = "val2014"  # where POPE's questions look for their pictures
OBJECTS = 3  # asked for that are there, and as many that are not
Annotation = dict[str, list[str]]  # image -> the objects that it shows, each once


def write_pope_questions(annotations: Path, out: Path, images: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Writes the files that `score pope` takes into the new folder `out`, and says what became of the pictures: `images` asked about,
    `questions` of each way, and `left_out`: why -> number.

    Args:
        annotations: COCO's instances as JSON, or JSON lines of image and objects.
        images: how many to draw; None for all that can be asked about.

    Raises BenchmarkError for an annotation that cannot be used, or with too few pictures that can.
    """
    shown = read_annotations(annotations)
    sets, left_out = pope_questions(shown, annotations, images, seed)
    with new_folder(out) as folder:
        (folder / "coco").mkdir()
        asked: list[dict[str, Any]] = []
        # In the order in which LLaVA's file has them.
        for category in sorted(sets):
            labels = [{"question_id": number, **record} for number, record in enumerate(sets[category], start=1)]
            # The score finds a label by the picture's file name alone.
            _write(folder / "coco" / f"coco_pope_{category}.json", [label | {"image": Path(label["image"]).name} for label in labels])
            for record in sets[category]:
                text = record["text"] + SINGLE_WORD
                asked.append({"question_id": len(asked) + 1, "image": record["image"], "text": text, "category": category})
        _write(folder / QUESTIONS, asked)
    number = len(sets[CATEGORIES[0]])
    return {"images": number // (2 * OBJECTS), "questions": number, "left_out": left_out}


def pope_questions(
    shown: Annotation, source: Path, images: int | None, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """(way of choosing -> records of image, text, label; why pictures were left out -> how many)."""
    frequency = Counter(item for items in shown.values() for item in items)
    together = _together(shown)
    few = {image for image, items in shown.items() if len(items) < OBJECTS}
    full = {image for image, items in shown.items() if len(frequency) - len(items) < OBJECTS} - few
    usable = [image for image in shown if image not in few | full]
    if not usable or len(usable) < (images or 1):
        raise BenchmarkError(
            f"{source} has {len(usable)} of the {images or 'some'} pictures to ask about; left out are {len(few)}, as fewer than {OBJECTS} "
            f"objects are on them, and {len(full)}, as fewer than {OBJECTS} of the set's {len(frequency)} objects are absent"
        )
    rng = random.Random(seed)
    sets: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
    for image in usable if images is None else rng.sample(usable, images):
        there = rng.sample(sorted(shown[image]), OBJECTS)
        absent = sorted(set(frequency) - set(shown[image]))
        not_there = {
            "random": rng.sample(absent, OBJECTS),
            "popular": sorted(absent, key=lambda item: -frequency[item])[:OBJECTS],
            "adversarial": _adversarial(there, absent, together, frequency),
        }
        for category, negatives in not_there.items():
            for positive, negative in zip(there, negatives, strict=True):
                sets[category] += [_record(image, positive, "yes"), _record(image, negative, "no")]
    return sets, {
        f"fewer than {OBJECTS} objects": len(few),
        f"fewer than {OBJECTS} absent objects": len(full),
        "not drawn": 0 if images is None else len(usable) - images,
    }


def _together(shown: Annotation) -> dict[str, Counter[str]]:
    """Object -> other object -> in how many pictures both are."""
    together: dict[str, Counter[str]] = {}
    for items in shown.values():
        for item in items:
            together.setdefault(item, Counter()).update(other for other in items if other != item)
    return together


def _adversarial(there: list[str], absent: list[str], together: dict[str, Counter[str]], frequency: Counter[str]) -> list[str]:
    chosen: list[str] = []
    for item in there:
        with_it = together[item]
        left = [other for other in absent if other not in chosen]
        # `absent` is sorted, and of equals the first is kept.
        chosen.append(max(left, key=lambda other: (with_it[other], frequency[other])))
    return chosen


def _record(image: str, item: str, label: str) -> dict[str, Any]:
    article = "an" if item[0].lower() in "aeiou" else "a"
    return {"image": image, "text": f"Is there {article} {item} in the image?", "label": label}


def _write(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read_annotations(file: Path) -> Annotation:
    """What each picture shows. Raises BenchmarkError, naming the place, for what is neither of the two forms."""
    shown = _read_coco(file)
    shown = _read_lines(file) if shown is None else shown
    if not shown:
        raise BenchmarkError(f"{file} names no pictures")
    names: dict[str, str] = {}
    for image in shown:
        other = names.setdefault(Path(image).name, image)
        if other != image:
            raise BenchmarkError(
                f"{file} has the pictures {other} and {image}: labels know a picture by its file name, which must be its own"
            )
    return shown


def _read_coco(file: Path) -> Annotation | None:
    """None if the file is not one JSON object with annotations."""
    try:
        content = json.loads(file.read_text(encoding=ENCODING))
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{file} cannot be read: {error}") from error
    except json.JSONDecodeError:
        return None
    if not isinstance(content, dict) or "annotations" not in content:
        return None
    names = {}
    for category in _records(content, "categories", file):
        where = f"a category of {file}"
        names[take(category, "id", where)] = _object(take(category, "name", where), where)
    shown: dict[Any, dict[str, None]] = {}  # image id -> objects in their order, once each
    files = {}
    for image in _records(content, "images", file):
        identity = take(image, "id", f"an image of {file}")
        files[identity], shown[identity] = take(image, "file_name", f"image {identity} of {file}"), {}
    for number, annotation in enumerate(_records(content, "annotations", file)):
        where = f"annotation {number} of {file}"
        image, category = take(annotation, "image_id", where), take(annotation, "category_id", where)
        if image not in shown or category not in names:
            raise BenchmarkError(f"{where} has image_id {image} and category_id {category}, but one of them is not in the file")
        shown[image][names[category]] = None
    if len(set(files.values())) < len(files):
        twice = Counter(files.values()).most_common(1)[0][0]
        raise BenchmarkError(f"{file} has the picture {twice} twice")
    return {files[image]: list(items) for image, items in shown.items()}


def _records(content: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    records = take(content, key, str(file))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise BenchmarkError(f"{file} must have a list of objects as {key!r}, but has {str(records)[:60]}")
    return records


def _read_lines(file: Path) -> Annotation:
    shown: Annotation = {}
    for number, record in enumerate(read_json_lines(file), start=1):
        where = f"record {number} of {file}"
        image, objects = take(record, "image", where), take(record, "objects", where)
        if not isinstance(image, str) or not image or not isinstance(objects, list):
            raise BenchmarkError(f"{where} must have a file name as image and a list as objects, but has {str(record)[:60]}")
        if image in shown:
            raise BenchmarkError(f"{where} has the picture {image} once more")
        shown[image] = list(dict.fromkeys(_object(item, where) for item in objects))
    return shown


def _object(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise BenchmarkError(f"{where} has the object {name!r}, but an object must be a word")
    return " ".join(name.split())
