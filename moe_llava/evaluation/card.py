"""Write the model card of a checkpoint, for the hub: its origin, MoE options, training data, results, and how to load it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moe_llava import __version__
from moe_llava.checkpoints.files import EXPORT_FIELD, SPARSE, read_config, read_json
from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import read_object, write_whole
from moe_llava.evaluation.ask.answers import SETTINGS
from moe_llava.evaluation.ask.contents import checkpoint_digests
from moe_llava.evaluation.score.tables import Cell, Column, find_results, read_result
from moe_llava.model.options import MoeOptions
from moe_llava.training.checks import RECORDS
from moe_llava.training.recipe import Recipe, read_recipe

CARD = "README.md"
# With a digest of the rest of the file, which shows whether it was edited since.
MARK = re.compile(r"<!-- written by moe-llava card, digest (\w+) -->")
HUB_ID = r"[\w.-]+/[\w.-]+"
TAGS = ["moe-llava", "mixture-of-experts"]


def write_card(folder: Path, results: Sequence[Path] = (), base: str | None = None, licence: str | None = None) -> Path:
    """Write the card of a model's folder, and return its file.

    Args:
        results: result.json files of `moe-llava evaluate`, or folders that hold BENCHMARK/result.json.
        base: the model that it was made from; default: as the recipe of a stage says. The metadata name it if it is a hub id.
        licence: its licence, as the hub names it; default: the base's, if its card is in its folder or in the hub's cache.

    Raises CheckpointError if `folder` is no checkpoint, has a card that somebody else wrote or edited, or did not give the results;
    BenchmarkError if results cannot be read.
    """
    config = read_config(folder)
    file = folder / CARD
    if file.exists() and not _is_own(file.read_text(encoding="utf-8")):
        raise CheckpointError(
            f"{file} was not written by this command, or edited since: move it, and add its text to the new card afterwards"
        )
    recipe = read_recipe(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else None
    bases = _origins(base, recipe)
    licence = licence or _licence_of(bases)
    measured = [_result_of(folder, result) for result in find_results(list(results))]
    data = ModelCardData(
        base_model=[base for base in bases if _is_hub_id(base)] or None,
        license=licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=TAGS,
        model_name=folder.resolve().name,
        eval_results=[entry for _, cells, _ in measured for entry in _metadata(cells)] or None,
    )
    sections = [
        f"# {folder.resolve().name}",
        _about(config, bases, licence),
        _options(config),
        _training(folder, recipe),
        _results(measured),
        _loading(config),
        f"Written with moe-llava {__version__}, transformers {config.get('transformers_version', 'unknown')}.",
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    write_whole(file, f"{text}\n<!-- written by moe-llava card, digest {_digest(text)} -->\n")
    return file


def _is_own(text: str) -> bool:
    """Return whether this module wrote the whole card."""
    mark = MARK.search(text)
    return mark is not None and _digest(text[: mark.start()].removesuffix("\n")) == mark[1] and not text[mark.end() :].strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result_of(folder: Path, file: Path) -> tuple[str, dict[Column, Cell], list[str]]:
    """Return the scores in a result file. Raise CheckpointError unless the model in `folder` gave the answers, to the questions as they
    are."""
    settings = read_object(file.parent / SETTINGS)
    if settings.get("checkpoint_files") != checkpoint_digests(str(folder)):
        raise CheckpointError(f"{file} holds results of {settings.get('checkpoint')}, whose files differ from those in {folder}")
    if "perturbation" in settings:
        raise CheckpointError(f"{file} holds results of perturbed questions, and a card has only those of the questions as they are")
    return read_result(file)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(HUB_ID, name) is not None and not Path(name).exists()


def _origins(base: str | None, recipe: Recipe | None) -> list[str]:
    """Return the models that the checkpoint was made from."""
    if base or recipe is None:
        return [base] if base else []
    parts = recipe.model
    return [parts] if isinstance(parts, str) else [parts.language_model, parts.vision_tower]


def _licence_of(bases: Sequence[str]) -> str | None:
    """Return the licence that the card of the only base names, in its folder or in the hub's cache; None if it is unknown."""
    if len(bases) != 1:
        return None
    local = Path(bases[0])
    found: Any = local / CARD if local.is_dir() else None
    if found is None and _is_hub_id(bases[0]):
        found = huggingface_hub.try_to_load_from_cache(bases[0], CARD)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    return ModelCard.load(found).data.license


def _about(config: dict[str, Any], bases: Sequence[str], licence: str | None) -> str:
    kind, origin = (
        config["architectures"][0],
        " and ".join(f"`{base if _is_hub_id(base) else Path(base).name}`" for base in bases) or "a dense model",
    )
    if EXPORT_FIELD in config:
        text = f"A sparse vision-language model, upcycled from {origin} and exported to `{kind}` of transformers."
    elif config["model_type"].startswith(SPARSE):
        text = (
            f"A sparse vision-language model (`{kind}`), upcycled from {origin}: in its MoE layers a router chooses experts for each token."
        )
    else:
        text = f"A vision-language model (`{kind}`), made from {origin}."
    return text + ("" if licence else " The licence of the base is not known to this card: see the base.")


def _options(config: dict[str, Any]) -> str:
    """Return a table of the MoE options; empty for a dense model."""
    options = config[EXPORT_FIELD]["options"] if EXPORT_FIELD in config else config
    known = [f for f in fields(MoeOptions) if f.name in options]
    rows = [f"| `{f.name}` | {options[f.name]} | {f.metadata['description'].partition(';')[0]} |" for f in known]
    return "\n".join(["## MoE options", "", "| option | value | meaning |", "|---|---|---|", *rows]) if rows else ""


def _training(folder: Path, recipe: Recipe | None) -> str:
    """Return what a stage's folder says on its training; empty for other folders."""
    name = re.fullmatch(r"(?:dense-)?stage(\d)", folder.resolve().name)
    if recipe is None or name is None:
        return ""
    settings = recipe.settings_of(int(name[1]))
    records = read_json(folder / RECORDS)["records"] if (folder / RECORDS).is_file() else None
    lines = [f"Stage {name[1]} of MoE-Tuning" + (f", on {records:,} records:" if records else ", on:"), ""]
    return "\n".join(["## Training", "", *lines, *(f"- `{Path(source.file).name}`" for source in settings.sources)])


def _results(measured: Sequence[tuple[str, dict[Column, Cell], list[str]]]) -> str:
    rows = [
        f"| {column.title} | {column.score or 'score'}, {column.unit} | {cell} | {cell.interval} | {cell.questions:,} |"
        for _, cells, _ in measured
        for column, cell in cells.items()
    ]
    if not rows:
        return ""
    remarks = [f"\n{remark}" for _, _, remarks in measured for remark in remarks]
    return "\n".join(
        ["## Results", "", "| benchmark | score | value | 95% interval | questions |", "|---|---|---|---|---|", *rows, *remarks]
    )


def _metadata(cells: dict[Column, Cell]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=column.benchmark,
            dataset_name=column.title,
            metric_type=column.score or "score",
            metric_value=cell.value,
        )
        for column, cell in cells.items()
    ]


def _loading(config: dict[str, Any]) -> str:
    """Return the lines of Python that load the checkpoint."""
    code = config["model_type"].startswith(SPARSE)
    trust = ", trust_remote_code=True" if code else ""
    note = "With `import moe_llava` before, `trust_remote_code` is not needed." if code else "It needs no other package than transformers."
    lines = [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("REPOSITORY"{trust})',
        f'processor = AutoProcessor.from_pretrained("REPOSITORY"{trust})',
    ]
    return "\n".join(["## Load", "", "```python", *lines, "```", "", note])
