"""Everything that can be wrong with recipe, data, checkpoints and folders, found before the first step."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from moe_llava.checkpoints.files import check_checkpoint
from moe_llava.checkpoints.load import check_origin_tokens, check_weights, load_on_meta
from moe_llava.common.errors import CheckpointError, DataError
from moe_llava.common.files import read_object, write_whole
from moe_llava.common.messages import changes
from moe_llava.data.encoder import Encoder
from moe_llava.data.shards import read_shard
from moe_llava.data.store import Records, check_problems, joined, read_records, sift, weighted
from moe_llava.data.stream import Stream
from moe_llava.model import SparseModel
from moe_llava.model.upcycling import check_kind, check_origins, sparse_config
from moe_llava.routing.routers import check_routers
from moe_llava.training.adapters import check_adapter
from moe_llava.training.distil import check_teacher
from moe_llava.training.features import check_cache
from moe_llava.training.parsing import flatten
from moe_llava.training.parts import is_native
from moe_llava.training.recipe import SHUFFLE_BUFFER, Data, Recipe, RecipeError, read_recipe
from moe_llava.training.saves import MANIFEST, OPTIMIZER, find_damage, saves
from moe_llava.training.sharding import check_zero
from moe_llava.training.stage import COEFFICIENT, STRUCTURE, Stage, check_made, load_structure, on_meta
from moe_llava.training.start import prepare_images, start_processor
from moe_llava.training.trainer import training_arguments

RECORDS = "records.json"  # in a stage's folder: which records it is trained on
FIRST = 10  # records of a stream that are encoded before the first step


def check_folder(stage: Stage, resume: bool) -> None:
    """Raise RecipeError if the stage's folder is in the way, or was made with other settings."""
    for folder in (stage.final, stage.work):
        if not folder.exists():
            continue
        if not folder.is_dir() or (folder == stage.final and not (folder / "config.json").is_file()):
            raise RecipeError(f"{folder} is in the way: it is no stage that was finished or begun")
        if not resume:
            raise RecipeError(f"{folder} exists already, finished or not: continue with --resume, or choose another output")
        if not (folder / "recipe.yaml").is_file():
            continue  # it was stopped before it had begun
        made = read_recipe(folder / "recipe.yaml")
        before, now = (_decisive(recipe, stage.number) for recipe in (made, stage.recipe))
        if changed := changes(before, now):
            raise RecipeError(f"{folder} was made with {'; '.join(changed)}: choose another output, or remove it")
    if stage.recipe.sharding and (found := saves(stage.work)) and not (found[-1] / OPTIMIZER).is_dir():
        raise RecipeError(f"{found[-1]} holds the optimizer as a whole, which sharding cannot resume: leave sharding out")


def _decisive(recipe: Recipe, number: int) -> dict[str, Any]:
    """Return the settings that decide the result of a stage."""
    whole = dataclasses.asdict(recipe)
    whole["stage3"]["moe"] = dataclasses.asdict(recipe.stage3.options)
    return flatten({key: whole[key] for key in ("model", "seed", "precision", "attention", "torch_compile", f"stage{number}")})


def check_stages(todo: list[Stage]) -> dict[Stage, Records | Stream]:
    """Return the records of each stage. Raises what `train` promises, for all of them."""
    encoders: list[list[Encoder]] = []  # of each stage, and of its teacher if it has one
    numbers = {stage.number for stage in todo}
    for stage in todo:
        adapter = stage.settings.adapter
        if stage.before not in numbers or (adapter and adapter.continue_from):
            path = stage.origin
            check_start(stage)
            processor = start_processor(path)
        if adapter:
            check_adapter(adapter, stage.name, stage.structure(path))
        if stage.recipe.feature_cache:
            check_cache(stage.recipe.feature_cache, stage.structure(path))
        prepare_images(processor, stage.settings)
        encoder = Encoder(processor, stage.settings.template, stage.settings.max_length)
        encoder.check_processor()
        check_packing(stage, processor)
        check_zero(training_arguments(stage))
        encoders.append([encoder])
        if stage.distillation:
            encoders[-1].append(check_teacher(stage, stage.distillation, stage.structure(path), encoder))
    problems: list[str] = []
    data = {stage: load_data(stage, found, problems) for stage, found in zip(todo, encoders, strict=True)}
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))  # stages may share a file
    return data


def check_packing(stage: Stage, processor: Any) -> None:
    """Raise RecipeError if a stage packs records for a model that reads more of a row than positions and tokens."""
    if stage.settings.optimisation.packing and processor.return_mm_token_type_ids:
        raise RecipeError(
            f"stage{stage.number}.optimisation.packing is true, but {type(processor).__name__} marks the tokens of images, from which the "
            "model derives positions or masks of a whole row: records packed in one row would see each other. Use group_by_length"
        )


def check_start(stage: Stage) -> None:
    """Raise CheckpointError, RecipeError or ValueError if the stage cannot start from its origin, or stage III could not upcycle it."""
    path, settings = stage.origin, stage.recipe.stage3
    if path == str(stage.final.with_name(f"stage{stage.before}")) and not Path(path).is_dir():
        raise CheckpointError(f"stage {stage.number} starts from {path}, which does not exist: run stage {stage.before} first")
    if isinstance(path, str):
        check_made(path)
        check_checkpoint(path, plain=True)
        check_weights(path)
    model = load_structure(path)
    if not isinstance(model, SparseModel):
        check_kind(type(model), model.config)
        if is_native(model):
            check_native(stage, model)
        else:
            on_meta(sparse_config(model.config, settings.options))
            for name in settings.experts_from:
                check_checkpoint(name, plain=True)
            check_origins(model, [load_on_meta(name) for name in settings.experts_from], settings.options.num_experts)
            check_origin_tokens(settings.experts_from, start_processor(path), str(path))
        return
    if stage.number != 3:
        raise RecipeError(f"{path} is sparse already: only stage III can continue from it (--stage 3)")
    if settings.dense:
        raise RecipeError(f"{path} is sparse already, but stage3.dense asks for the dense baseline, which starts from a dense model")
    for name, value, default in (("expert_start", settings.expert_start, "copy"), ("experts_from", settings.experts_from, [])):
        if value != default:
            raise RecipeError(f"{path} is sparse already, but stage3.{name} is {value}, which is for experts that are made here")
    wanted = type(model.config)(**model.config.to_dict() | dataclasses.asdict(settings.options))
    for name in STRUCTURE:
        attribute = "moe_layer_indices" if name == "moe_layers" else name
        has, asked = getattr(model.config, attribute), getattr(wanted, attribute)
        if has != asked:
            raise RecipeError(f"{path} has {name} {has}, but stage3.moe.{name} says {asked}, and its weights cannot change that")
    had, given = model.config, settings.options
    lost = {
        "routing": had.routing == "smoes" and given.routing != "smoes",
        "router_bias_rate": had.router_bias_rate and not given.router_bias_rate,
    }
    for name, is_lost in lost.items():
        if is_lost:
            values = f"{path} has {name} {getattr(had, name)}, but stage3.moe.{name} says {getattr(given, name)}"
            raise RecipeError(f"{values}, and its weights hold buffers of that option: set it")


def check_native(stage: Stage, model: Any) -> None:
    """Raise RecipeError if a stage, or a setting of it, does not apply to a model with experts of its family's own, RoutingError if these
    experts or their routers are not found."""
    has, settings = f"{stage.origin} is a {type(model).__name__}, which has experts of its own", stage.recipe.stage3
    if stage.number != 3:
        raise RecipeError(f"{has}: only stage III trains it, so leave out stage{stage.number}")
    own = model.config.get_text_config()
    wrong: dict[str, Any] = {f"stage3.moe.{name}": True for name in settings.given if name != COEFFICIENT or not hasattr(own, COEFFICIENT)}
    wrong |= {
        "stage3.dense": settings.dense,
        "stage3.expert_start": settings.expert_start != "copy",
        "stage3.experts_from": settings.experts_from,
        "stage3.adapter": settings.adapter,
        "sharding": stage.recipe.sharding,  # transformers shards no weights that it converts on loading, as it does those of some
    }
    if found := [name for name, is_set in wrong.items() if is_set]:
        raise RecipeError(f"{has}, but {', '.join(found)} is set, which is for experts that are made here: leave it out")
    check_routers(model)


def load_data(stage: Stage, encoders: list[Encoder], problems: list[str]) -> Records | Stream:
    """Return the records of a stage that all of `encoders` take, without the bad ones if these are to be skipped. Other problems go into
    `problems`. The records of a stream are checked when they are read, but for the first ones."""
    if stage.settings.stream:
        try:
            return open_stream(stage, stage.settings.stream, encoders)
        except DataError as error:
            problems.append(str(error))
    parts = []
    for source in stage.settings.sources if stage.settings.stream is None else ():
        try:
            found = read_records(source.file, source.images)
            for encoder in encoders:
                found = sift(found, stage.number, encoder)
            if stage.recipe.on_bad_record == "stop":
                check_problems(found, source.file)
            parts.append(weighted(found, source.weight, stage.recipe.seed))
            if not len(parts[-1]):
                left = f", without {len(found.problems)} bad ones, such as {found.problems[0]}" if found.problems else ""
                problems.append(
                    f"stage{stage.number}.data has weight {source.weight} for {source.file}, which leaves no record of it{left}"
                )
        except DataError as error:
            problems.append(str(error))
    return joined(parts) if parts else Records([], np.zeros((0, 2), np.int64))


def open_stream(stage: Stage, source: Data, encoders: list[Encoder]) -> Stream:
    """Return the stream of a stage. Raises DataError if its first records are bad: one of them, or all if bad ones are to be skipped."""
    sizes, workers = stage.settings.optimisation, stage.recipe.dataloader_workers
    length, processes = sizes.max_steps * sizes.batch_size, PartialState().num_processes
    buffer = source.shuffle_buffer or SHUFFLE_BUFFER
    stream = Stream(source.file, length, sizes.per_device_batch_size, processes, workers, buffer, stage.recipe.seed, stage.number)
    problems, number = [], 0
    for number, (_, where, item) in enumerate(islice(read_shard(stream.shards[0]), FIRST), start=1):  # noqa: B007
        try:
            record = stream.parse(where, item)
            for encoder in encoders:
                encoder(record)
        except DataError as error:
            problems.append(str(error))
    if problems and (stage.recipe.on_bad_record == "stop" or len(problems) == number):
        raise DataError("\n".join(problems))
    return stream


def check_files(data: dict[Stage, Records | Stream]) -> None:
    """Raise DataError if a file that a stage starts or resumes from is damaged, or if a stage that was begun had other records."""
    for stage, records in data.items():
        adapter = stage.settings.adapter
        if stage.before not in {other.number for other in data} and isinstance(stage.origin, str):
            _check_manifest(Path(stage.origin))
        if adapter and adapter.continue_from:
            _check_manifest(Path(adapter.continue_from))
        if stage.distillation:
            _check_manifest(Path(stage.distillation.teacher))
        _check_manifest(stage.work / "base")  # of an adapter that was begun
        check_resume(stage.work, records)


def _check_manifest(folder: Path) -> None:
    """Raise DataError if a folder has a manifest, and files that are not as it says."""
    if (folder / MANIFEST).is_file() and (problems := find_damage(folder)):
        way = f"restore it, or train that stage again; if it was changed on purpose, remove {folder / MANIFEST}"
        raise DataError("\n".join([*problems, way]))


def check_resume(work: Path, records: Records | Stream) -> None:
    """Raise DataError if a stage that was begun cannot be resumed from its last save.

    Either it was begun on other records, so that a run would see some twice and others never; or the save is damaged, and the message names
    the last whole one.
    """
    found = saves(work)
    if not found:
        return
    before, now = _read_described(work), describe(records)
    if before and before["digest"] != now["digest"]:
        raise DataError(
            f"{work} was begun on {before['records']:,} records, and its data files now hold others ({now['records']:,}): "
            "put them back, or remove the folder and begin again"
        )
    if isinstance(records, Stream):
        records.read_positions(found[-1])
    if not (problems := find_damage(found[-1])):
        return
    whole = next((save for save in reversed(found[:-1]) if not find_damage(save)), None)
    if whole is None:
        raise DataError("\n".join([*problems, f"no other save is whole: remove {work} to begin the stage again"]))
    later = " and ".join(str(save) for save in found[found.index(whole) + 1 :])
    raise DataError("\n".join([*problems, f"{whole} is whole: remove {later} to resume from it"]))


def describe(records: Records | Stream) -> dict[str, Any]:
    return {"records": len(records), "digest": records.digest()}


def write_records(work: Path, records: Records | Stream) -> None:
    """Write which records a stage is trained on."""
    write_whole(work / RECORDS, json.dumps(describe(records)))


def _read_described(work: Path) -> dict[str, Any]:
    """Return what `write_records` wrote, or nothing. Raises DataError if it is damaged."""
    file = work / RECORDS
    if not file.is_file():
        return {}
    found = read_object(file)
    if not isinstance(found.get("digest"), str) or not isinstance(found.get("records"), int):
        raise DataError(f"{file} is damaged: it names no records")
    return found
