"""Runs the stages of a recipe, each from the checkpoint of the one before.

A finished stage is a folder `<output>/stage1`, `stage2`, `stage3` or `dense` that loads by itself. While a stage runs, its folder has a
dot before its name and holds what is needed to resume; it is renamed when it is complete, so a folder without a dot is never half written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import LlavaForConditionalGeneration, TrainingArguments, set_seed

from moe_llava.common.errors import DataError
from moe_llava.common.files import read_lines, write_whole
from moe_llava.common.messages import changes
from moe_llava.data.batches import Collator, ConversationDataset, EmptyImage, GroupedSampler
from moe_llava.data.rendering import check_prompt
from moe_llava.data.store import Records, check_problems, joined, read_records, sift, weighted
from moe_llava.training.adapters import attach, check_adapter, describe_base, without_adapter, write_adapter
from moe_llava.training.budget import active_parameters
from moe_llava.training.checksums import write_manifest
from moe_llava.training.features import cached_features, check_cache
from moe_llava.training.locking import lock_file, lock_stages
from moe_llava.training.parsing import flatten
from moe_llava.training.recipe import Recipe, RecipeError, Stage, learning_stage, read_recipe, stage_name, stage_settings
from moe_llava.training.resuming import check_resume, check_weights, write_records
from moe_llava.training.saves import Stopped, full_disk_named, remove_saves, saves, saving, step_of, work_folder
from moe_llava.training.sharding import ShardedTrainer, check_engine, check_zero, sharding_of, whole_model
from moe_llava.training.stages import STAGES, checkpoint_layers, choose_parameters
from moe_llava.training.start import (
    base_of_stage,
    check_start,
    moe_layers_of,
    origin,
    set_aspect_ratio,
    start,
    start_processor,
    structure,
    use_bf16,
    write_recipe,
)
from moe_llava.training.stopping import StopWhenAsked
from moe_llava.training.trainer import SKIPPED, StageTrainer
from moe_llava.training.watch import ProgressDisplay, plot_run

MOST_NAMED = 3  # bad records, on the console
TITLES = {
    "stage1": "stage I, the projector",
    "stage2": "stage II, projector and language model",
    "stage3": "stage III, experts and routers",
    "dense": "stage III of the dense control, the same FFNs",
}


def train(recipe: Recipe, stages: list[int], resume: bool, console: Console) -> list[Path]:
    """Runs `stages` (of 1, 2, 3) in order and returns their folders.

    Everything that can be wrong with recipe, data and first model is looked for before the first step. With `resume`, finished stages
    are kept and an unfinished one goes on from its last save; without it, a folder in the way is an error, and so is another run that is
    at one of the stages.

    Raises RecipeError, DataError, CheckpointError, SaveError or ValueError, each naming what is wrong.
    """
    check_engine(recipe)
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not state.is_main_process:
        console = Console(quiet=True)
    for number in stages:
        stage_settings(recipe, number)  # raises if the recipe has no such stage
    names = [stage_name(recipe, number) for number in stages]
    output = Path(recipe.output)
    todo = [name for name in names if not (output / name).is_dir() or saves(output / name) or lock_file(output, name).exists()]
    with contextlib.ExitStack() as held:
        in_main_process(lambda: held.enter_context(lock_stages(output, todo)))
        with full_disk_named(output):
            train_stages(recipe, dict(zip(stages, names, strict=True)), resume, console)
    return [output / name for name in names]


def train_stages(recipe: Recipe, names: dict[int, str], resume: bool, console: Console) -> None:
    """Train what of the stages, number -> name, is not finished. No other run may be at them."""
    state, output = PartialState(), Path(recipe.output)
    todo = {number: name for number, name in names.items() if not (output / name).is_dir()}
    for name in names.values():
        check_folder(recipe, output / name, resume)
        if (output / name).is_dir():
            if state.is_main_process:
                remove_saves(output / name)  # if the run was killed before it could
            console.print(f"{output / name}: finished, kept", highlight=False, soft_wrap=True)
    if not todo:
        return
    data = check_everything(recipe, todo)

    def check_files() -> None:
        for number, name in todo.items():
            work, adapter = work_folder(output / name), stage_settings(recipe, number).adapter
            if number - 1 not in todo and isinstance(path := origin(recipe, number), str):
                check_weights(path)
            if adapter and adapter.continue_from:
                check_weights(adapter.continue_from)
            check_weights(work / "base")  # of an adapter that was begun
            check_resume(work, data[name], console)

    in_main_process(check_files)
    state.wait_for_everyone()  # nobody makes a folder before everybody has looked
    for number, name in todo.items():
        run_stage(recipe, number, name, data[name], console)
        state.wait_for_everyone()


def in_main_process(check: Callable[[], object]) -> None:
    """Call `check` in the main process, and raise what it raises in all: the others would wait for it."""
    raised: list[Exception | None] = [None]
    if PartialState().is_main_process:
        try:
            check()
        except (ValueError, OSError) as error:
            raised = [error]
    broadcast_object_list(raised)
    if raised[0] is not None:
        raise raised[0]


def check_folder(recipe: Recipe, final: Path, resume: bool) -> None:
    """Raises RecipeError if the stage's folder is in the way, or was made with other settings."""
    for folder in (final, work_folder(final)):
        if not folder.exists():
            continue
        if not folder.is_dir() or (folder == final and not (final / "config.json").is_file()):
            raise RecipeError(f"{folder} is in the way: it is no stage that was finished or begun")
        if not resume:
            raise RecipeError(f"{folder} exists already, finished or not: go on with --resume, or choose another output")
        if not (folder / "recipe.yaml").is_file():
            continue  # it was stopped before it had begun
        made = read_recipe(folder / "recipe.yaml")
        before, now = _what_counts(made, final.name), _what_counts(recipe, final.name)
        if folder != final:  # what was saved in parts is not read as a whole, nor the other way round
            before, now = before | sharding_of(made), now | sharding_of(recipe)
        if changed := changes(before, now):
            raise RecipeError(f"{folder} was made with {'; '.join(changed)}: choose another output, or remove it")


def check_everything(recipe: Recipe, todo: dict[int, str]) -> dict[str, Records]:
    """Raises what `train` promises for all stages to come; returns the records of each."""
    processors = {}
    for number in todo:
        settings = stage_settings(recipe, number)
        adapter = settings.adapter
        if number - 1 not in todo or (adapter and adapter.continue_from):
            path = origin(recipe, number)
            check_start(recipe, number, path)
            processor = start_processor(path)
        if adapter:
            check_adapter(adapter, todo[number], structure(recipe, number, path))
        if recipe.feature_cache:
            check_cache(recipe.feature_cache, structure(recipe, number, path))
        set_aspect_ratio(processor, settings)
        ConversationDataset([], processor, settings.template)  # raises if the tokenizer does not do for the stage
        check_zero(training_arguments(recipe, settings, work_folder(Path(recipe.output) / todo[number])))
        check_prompt(processor.tokenizer, processor.image_token)
        processors[number] = processor
    problems: list[str] = []
    data = {name: load_data(recipe, number, processors[number], problems) for number, name in todo.items()}
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))  # stages may share a file
    return data


def load_data(recipe: Recipe, number: int, processor: Any, problems: list[str]) -> Records:
    """The records of a stage, without the bad ones where these are to be skipped; what else is wrong goes into `problems`."""
    parts, settings, image_tokens = [], stage_settings(recipe, number), EmptyImage.of(processor).tokens
    for source in settings.sources:
        try:
            read = read_records(source.file, source.images)
            found = sift(read, number, processor.tokenizer, settings.template, image_tokens, settings.max_length)
            if recipe.on_bad_record == "stop":
                check_problems(found, source.file)
            parts.append(weighted(found, source.weight, recipe.seed))
            if not len(parts[-1]):
                left = f", without {len(found.problems)} bad ones, such as {found.problems[0]}" if found.problems else ""
                problems.append(f"stage{number}.data has weight {source.weight} for {source.file}, which leaves no record of it{left}")
        except DataError as error:
            problems.append(str(error))
    return joined(parts) if parts else Records([], np.zeros((0, 2), np.int64))


def run_stage(recipe: Recipe, number: int, name: str, records: Records, console: Console) -> None:
    """Trains one stage and leaves `<output>/<name>`: model, processor, log.jsonl, recipe.yaml."""
    final = Path(recipe.output) / name
    work = work_folder(final)
    set_seed(recipe.seed)
    settings, learns = stage_settings(recipe, number), learning_stage(recipe, number)
    arguments = training_arguments(recipe, settings, work)
    model, processor = start(recipe, number, name)
    set_seed(recipe.seed)  # again, as making the model may have drawn numbers, and a resumed run may find it made
    moe_layers = moe_layers_of(recipe, model)
    if settings.adapter:
        console.print(describe_base(model, settings.adapter), highlight=False, soft_wrap=True)
        model, counts = attach(model, settings.adapter, name, base_of_stage(recipe, number, name, work))
    else:
        counts = choose_parameters(model, learns, moe_layers)
    if settings.optimisation.gradient_checkpointing:
        checkpoint_layers(without_adapter(model))
    console.print(f"[bold]{TITLES[name]}[/bold]: {len(records):,} records, {counts}", highlight=False, soft_wrap=True)
    display = ProgressDisplay(name, console)
    image = EmptyImage.of(processor)
    cache = cached_features(without_adapter(model), recipe.feature_cache) if recipe.feature_cache else contextlib.nullcontext()
    with StopWhenAsked() as stop, cache:
        trainer = (ShardedTrainer if recipe.sharding else StageTrainer)(
            model=model,
            args=arguments,
            train_dataset=ConversationDataset(records, processor, settings.template, settings.max_length),
            data_collator=Collator(
                processor.tokenizer.pad_token_id, image if "projector" in STAGES[learns] else None, settings.optimisation.packing
            ),
            callbacks=[stop],
            work=work,
            display=display,
            save_total_limit=recipe.save_total_limit,
            sampler=make_sampler(settings, records, image.tokens, arguments),
            skip_bad_records=recipe.on_bad_record == "skip",
        )
        if trainer.is_world_process_zero():
            write_recipe(recipe, work)
            write_skipped(work, records.problems, console)
            write_records(work, records)
        save = saves(work)[-1] if saves(work) else None
        if save is not None:
            console.print(f"{name} resumes after step {step_of(save)}, from {save}", highlight=False, soft_wrap=True)
        try:
            trainer.run(save)
        finally:
            display.progress.stop()
    if trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"{name} stopped as asked after step {trainer.state.global_step} of {trainer.state.max_steps}: go on with --resume")
    model = whole_model(model)
    if trainer.is_world_process_zero():
        if settings.adapter:
            with saving(work, "the adapter"):
                model = write_adapter(model, work / "adapter", *(base_of_stage(recipe, number, name, folder) for folder in (work, final)))
        finish(work, final, model, processor)
        console.print(f"{final}: {active_parameters(model):,} active parameters", highlight=False, soft_wrap=True)


def write_skipped(work: Path, problems: list[str], console: Console) -> None:
    """Writes the records that were left out before the first step to `skipped.jsonl`, as of step 0, and names the first few."""
    if not problems:
        return
    later = [line for line in read_lines(work / SKIPPED) if line["step"]]
    lines = [{"step": 0, "problem": problem} for problem in problems] + later
    write_whole(work / SKIPPED, "".join(json.dumps(line) + "\n" for line in lines))
    console.print(f"bad records left out: {len(problems):,}, named in {SKIPPED}", highlight=False, soft_wrap=True)
    for line in [*problems[:MOST_NAMED], *(["..."] if len(problems) > MOST_NAMED else [])]:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def make_sampler(settings: Stage, records: Records, image_tokens: int, arguments: TrainingArguments) -> GroupedSampler | None:
    """None is Trainer's own random order."""
    if not settings.optimisation.group_by_length:
        return None
    lengths = np.minimum(records.lengths(image_tokens), settings.max_length or np.iinfo(np.int64).max)
    has_image = records.image_counts() > 0
    at_once = (settings.optimisation.batch_size, settings.optimisation.per_device_batch_size, arguments.world_size)
    return GroupedSampler(lengths, has_image, *at_once, arguments.seed)


def finish(work: Path, final: Path, model: LlavaForConditionalGeneration, processor: Any) -> None:
    """Writes what a finished stage is, and gives its folder its name. The saves go last: a run can go on from them until then."""
    with saving(work, "the finished stage"):
        model.save_pretrained(work)
        for folder in (work, work / "adapter"):
            if folder.is_dir():
                write_manifest(folder, folder.glob("*.safetensors"))
        processor.save_pretrained(work)
        plot = plot_run([line for line in read_lines(work / "log.jsonl") if "loss" in line])
        plot.savefig(work / "run.png", dpi=110)
        plt.close(plot)
    work.rename(final)
    remove_saves(final)


def training_arguments(recipe: Recipe, stage: Stage, work: Path) -> TrainingArguments:
    """A stage's settings in transformers' words.

    Raises RecipeError if the batch cannot be shared out.
    """
    settings = stage.optimisation
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=settings.per_device_batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=use_bf16(recipe.precision),
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        save_steps=recipe.save_steps,
        torch_compile=recipe.torch_compile,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=recipe.dataloader_workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # what learns takes part in every step: see EmptyImage
        disable_tqdm=True,
        report_to=recipe.report_to or "none",
    )
    if arguments.n_gpu > 1:
        raise RecipeError(f"one process sees {arguments.n_gpu} devices: start one for each with torchrun, or hide all but one from it")
    at_once = arguments.train_batch_size * arguments.world_size
    if settings.batch_size % at_once:
        raise RecipeError(
            f"batch_size is {settings.batch_size}, but must be a multiple of what all {at_once // settings.per_device_batch_size} devices "
            f"compute at once, {at_once}"
        )
    arguments.gradient_accumulation_steps = settings.batch_size // at_once
    return arguments


def _what_counts(recipe: Recipe, name: str) -> dict[str, Any]:
    """The settings that decide what a stage's folder holds."""
    whole = dataclasses.asdict(recipe)
    stage = "stage3" if name == "dense" else name
    return flatten({key: whole[key] for key in ("model", "seed", "precision", "attention", "torch_compile", stage)})
