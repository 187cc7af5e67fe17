"""Identify what an experiment reads by content: the data of its recipes, what training starts from, and the benchmark."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from moe_llava.common.errors import DataError
from moe_llava.data.files import read_items
from moe_llava.data.records import parse_record
from moe_llava.evaluation.ask.contents import checkpoint_digests, content_digest, joint_digest, visible
from moe_llava.evaluation.score.benchmark import Benchmark, Question, find_file
from moe_llava.training.recipe import Parts, Recipe, stage_settings, stages_of


def recipe_digests(recipes: Collection[Recipe]) -> dict[str, str | None]:
    """Return what recipes read, by its name -> its digest: each data file, its images together, and each file of what training starts from.

    Raise DataError if a data file cannot be read, CheckpointError if a checkpoint cannot.
    """
    found: dict[str, str | None] = {}
    stages = [stage_settings(recipe, number) for recipe in recipes for number in stages_of(recipe)]
    for file, images in dict.fromkeys((source.file, source.images) for stage in stages for source in stage.sources):
        found |= _data_digests(Path(file), Path(images))
    starts = [start for recipe in recipes for start in _starts(recipe)]
    starts += [stage.adapter.continue_from for stage in stages if stage.adapter and stage.adapter.continue_from]
    for start in dict.fromkeys(starts):
        found |= {f"{start}/{name}": digest for name, digest in checkpoint_digests(start).items()}
    return found


def _starts(recipe: Recipe) -> list[str]:
    return [recipe.model.language_model, recipe.model.vision_tower] if isinstance(recipe.model, Parts) else [recipe.model]


def _data_digests(file: Path, folder: Path) -> dict[str, str | None]:
    if file.is_dir():
        digest = joint_digest(visible(file.rglob("*")), file)
    elif file.is_file():
        digest = content_digest(file)
    else:
        raise DataError(f"data file {file} does not exist")
    return {str(file): digest, f"images of {file} in {folder}": joint_digest(_images(file, folder), folder)}


def _images(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the image files that records name. Images in rows are part of the data file; bad records are for training to report."""
    for where, item in read_items(file):
        try:
            record = parse_record(where, item, folder)
        except DataError:
            continue
        yield from (image for image in record.images if isinstance(image, Path))


def benchmark_digests(benchmark: Benchmark, folder: Path, questions: list[Question]) -> dict[str, str | None]:
    """Return the same of a benchmark: each of its files, a folder among them as one, and the pictures that it asks about."""
    found: dict[str, str | None] = {}
    for name in benchmark.files:
        path = find_file(folder, name)
        found[str(path)] = joint_digest(visible(path.rglob("*")), path) if path.is_dir() else content_digest(path)
    pictures = [image for question in questions for image in question.images if isinstance(image, Path)]
    return found | {f"pictures of {benchmark.title}": joint_digest(pictures, folder)}
