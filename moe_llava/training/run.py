"""Run the stages of a recipe, each from the checkpoint of the one before.

A finished stage is a folder `<output>/stage1`, `stage2`, `stage3` or `dense` that loads by itself. While a stage runs, its folder has a
dot before its name and holds what is needed to resume; it is renamed when it is complete, so a folder without a dot is never half written.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, set_seed

from moe_llava.checkpoints.files import EXAMPLES
from moe_llava.common.files import read_lines, write_whole
from moe_llava.data.batches import Collator, ConversationDataset, GroupedSampler
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import IMAGE_TOKEN, VIDEO_TOKEN
from moe_llava.data.store import Records
from moe_llava.data.stream import Stream, StreamCollator, StreamDataset
from moe_llava.training.adapters import attach, cast_frozen, describe_base, without_adapter, write_adapter
from moe_llava.training.budget import active_parameters
from moe_llava.training.checks import check_files, check_folder, check_stages, write_records
from moe_llava.training.distil import LiveInputs, TaughtCollator, TaughtDataset, TeacherCache, prepare_teacher, vocabulary_size
from moe_llava.training.features import cached_features
from moe_llava.training.parts import moe_layers, native_experts
from moe_llava.training.process import Begun, StopWhenAsked, lock_file, lock_stages
from moe_llava.training.recipe import Recipe
from moe_llava.training.saves import Stopped, full_disk_named, remove_saves, saves, saving, step_of, write_manifest
from moe_llava.training.sharding import ShardedTrainer, check_engine, whole_model
from moe_llava.training.stage import Stage
from moe_llava.training.start import start
from moe_llava.training.trainable import TRAINABLE, ParameterCount, checkpoint_layers, choose_parameters
from moe_llava.training.trainer import SKIPPED, StageTrainer, training_arguments
from moe_llava.training.watch import ProgressDisplay, plot_run

# The longest wait for another process. The main one alone upcycles, writes and hashes, which takes more than NCCL's ten minutes if a model
# is large. The price: a process that hangs, other than one that ends, stops its neighbours only after this time.
PATIENCE = timedelta(hours=6)
MOST_NAMED = 3  # bad records, on the console
MOST_EXAMPLES, EXAMPLES_FROM = 3, 1000  # questions, and the records that they are taken from
TITLES = {
    "stage1": "stage I, the projector",
    "stage2": "stage II, projector and language model",
    "stage3": "stage III, experts and routers",
    "dense": "stage III of the dense baseline, the same FFNs",
}


def train(recipe: Recipe, numbers: list[int], resume: bool, console: Console) -> list[Path]:
    """Run the stages `numbers` (of 1, 2, 3) in order and return their folders.

    Everything that can be wrong with recipe, data and first model is checked before the first step. With `resume`, finished stages are kept
    and an unfinished one is resumed from its last save; without it, a folder in the way is an error, unless torchrun restarts the run.
    Another run that trains one of the stages is an error too.

    Raises RecipeError, DataError, CheckpointError, SaveError or ValueError, each naming what is wrong.
    """
    check_engine(recipe)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if not state.is_main_process:
        console = Console(quiet=True)
    stages = [Stage(recipe, number) for number in numbers]
    output = Path(recipe.output)
    begun = Begun(output)
    touched = [stage.name for stage in stages if not stage.final.is_dir() or saves(stage.final) or lock_file(output, stage.name).exists()]
    with contextlib.ExitStack() as held:
        in_main_process(lambda: held.enter_context(lock_stages(output, touched)))
        with full_disk_named(output):
            try:
                train_stages(stages, resume or bool(begun), console, begun)
            except Stopped:
                begun.remove()
                raise
        begun.remove()
    return [stage.final for stage in stages]


def train_stages(stages: list[Stage], resume: bool, console: Console, begun: Begun) -> None:
    """Train those of the stages that are not finished, and write `begun` before. No other run may be training them."""
    state = PartialState()
    todo = [stage for stage in stages if not stage.final.is_dir()]
    for stage in stages:
        check_folder(stage, resume)
        if stage not in todo:
            if state.is_main_process and not stage.recipe.keep_saves:
                remove_saves(stage.final)  # if the run was killed before it could
            console.print(f"{stage.final}: finished, kept", highlight=False, soft_wrap=True)
    if not todo:
        return
    data = check_stages(todo)
    in_main_process(lambda: check_files(data))
    state.wait_for_everyone()  # nobody makes a folder before everybody has looked
    if state.is_main_process:
        begun.write()
    for stage, records in data.items():
        run_stage(stage, records, console)
        gc.collect()  # Trainer is in cycles of references: without this, its weights and moments stay in memory during the next stage
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


def run_stage(stage: Stage, records: Records | Stream, console: Console) -> None:
    """Train one stage and leave its final folder: model, processor, log.jsonl, recipe.yaml."""
    recipe, settings = stage.recipe, stage.settings
    set_seed(recipe.seed)
    arguments = training_arguments(stage)
    save = saves(stage.work)[-1] if saves(stage.work) else None
    model, processor = start(stage, save)
    encoder = Encoder(processor, settings.template, settings.max_length)
    teach, teacher = None, None
    if stage.distillation:
        teach, teacher = prepare_teacher(stage, stage.distillation, records, vocabulary_size(model.config))
    set_seed(recipe.seed)  # again, as making the model may have drawn numbers, and a resumed run may find it made
    if settings.adapter:
        console.print(describe_base(model, settings.adapter), highlight=False, soft_wrap=True)
    model, counts = prepare_parameters(stage, model)
    console.print(f"[bold]{TITLES[stage.name]}[/bold]: {len(records):,} records, {counts}", highlight=False, soft_wrap=True)
    display = ProgressDisplay(stage.name, console)
    collator = Collator(encoder.nothing(), encoder.empty_image() if needs_images(stage, model) else None, settings.optimisation.packing)
    dataset, collate = make_items(records, encoder, collator, teach)
    cache = cached_features(without_adapter(model), recipe.feature_cache) if recipe.feature_cache else contextlib.nullcontext()
    with StopWhenAsked() as stop, cache:
        trainer = (ShardedTrainer if recipe.sharding else StageTrainer)(
            stage,
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collate,
            teacher=teacher,
            callbacks=[stop],
            display=display,
            sampler=make_sampler(stage, records, encoder, arguments.world_size),
        )
        if trainer.is_world_process_zero():
            stage.write_recipe()
            write_skipped(stage.work, records.problems, console)
            write_records(stage.work, records)
        if save is not None:
            console.print(f"{stage.name} resumes after step {step_of(save)}, from {save}", highlight=False, soft_wrap=True)
        try:
            trainer.run(save)
        finally:
            display.progress.stop()
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        raise Stopped(f"{stage.name} stopped as asked after step {step} of {steps}")
    model = whole_model(model)
    if trainer.is_world_process_zero():
        write_examples(stage.work, records)
        finished = finish(stage, model, processor)
        console.print(f"{stage.final}: {active_parameters(finished):,} active parameters", highlight=False, soft_wrap=True)


def make_items(
    records: Records | Stream, encoder: Encoder, collator: Collator, teach: LiveInputs | TeacherCache | None
) -> tuple[Dataset, Callable[[list[Any]], dict[str, Any]]]:
    """Return (the items of records, what makes a batch of them), with the teacher's part if the stage has a teacher."""
    dataset: Dataset = TaughtDataset(records, encoder, teach) if teach else ConversationDataset(records, encoder)
    collate = TaughtCollator(collator, teach) if teach else collator
    if isinstance(records, Stream):
        return StreamDataset(dataset, records), StreamCollator(collate)
    return dataset, collate


def needs_images(stage: Stage, model: Any) -> bool:
    """Return whether a stage trains modules that only images go through: the projector, or experts that are for images alone."""
    plain = without_adapter(model)
    return (
        "projector" in TRAINABLE[stage.trainable]
        or bool(stage.vision_ffns(plain))
        or len(native_experts(plain)) > len(moe_layers(plain)) > 0
    )


def prepare_parameters(stage: Stage, model: PreTrainedModel) -> tuple[Any, ParameterCount]:
    """Return (model, its parameters counted): the stage's parts are trainable, or an adapter is attached and the rest is frozen."""
    settings = stage.settings
    if settings.adapter:
        model, counts = attach(model, settings.adapter, stage.name, stage.adapter_base(stage.work))
        if stage.bf16:
            cast_frozen(model, settings.adapter)
    else:
        counts = choose_parameters(model, stage.trainable, stage.moe_layers(model), stage.vision_ffns(model))
    if settings.optimisation.gradient_checkpointing:
        checkpoint_layers(without_adapter(model))
    return model, counts


def write_skipped(work: Path, problems: Sequence[str], console: Console) -> None:
    """Write the records that were left out before the first step to `skipped.jsonl`, as of step 0, and print the first few."""
    if not problems:
        return
    later = [line for line in read_lines(work / SKIPPED) if line["step"]]
    lines = [{"step": 0, "problem": problem} for problem in problems] + later
    write_whole(work / SKIPPED, "".join(json.dumps(line) + "\n" for line in lines))
    console.print(f"bad records left out: {len(problems):,}, named in {SKIPPED}", highlight=False, soft_wrap=True)
    for line in [*problems[:MOST_NAMED], *(["..."] if len(problems) > MOST_NAMED else [])]:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def make_sampler(stage: Stage, records: Records | Stream, encoder: Encoder, processes: int) -> Sampler | None:
    """Return the sampler of `group_by_length`, that of a stream, which is in order, or None for Trainer's own random order."""
    settings = stage.settings
    if isinstance(records, Stream):
        return SequentialSampler(records)
    if not settings.optimisation.group_by_length:
        return None
    has_video = records.has_video()
    with_images = records.at(np.flatnonzero(records.image_counts()))
    tokens = encoder.estimate_image_tokens(with_images), encoder.estimate_video_tokens(records.at(np.flatnonzero(has_video)))
    lengths = np.minimum(records.lengths(*tokens), settings.max_length or np.iinfo(np.int64).max)
    has_image = (records.image_counts() > 0) | has_video
    sizes = (settings.optimisation.batch_size, settings.optimisation.per_device_batch_size)
    return GroupedSampler(lengths, has_image, *sizes, processes, stage.recipe.seed)


def write_examples(work: Path, records: Records | Stream) -> None:
    """Write the most frequent first questions of the records: what the model can be asked. A stream is not read again for them."""
    if isinstance(records, Stream):
        return
    asked = Counter(records[index].turns[0][0] for index in range(min(len(records), EXAMPLES_FROM)))
    questions = [text.replace(IMAGE_TOKEN, "").replace(VIDEO_TOKEN, "").strip() for text, _ in asked.most_common(MOST_EXAMPLES)]
    write_whole(work / EXAMPLES, json.dumps({"questions": [text for text in questions if text]}, indent=1, ensure_ascii=False) + "\n")


def finish(stage: Stage, model: Any, processor: Any) -> PreTrainedModel:
    """Write and return the model of a finished stage, with its adapter merged, and rename the stage's folder. The saves are removed last:
    until then, a run can resume from them."""
    work = stage.work
    if stage.settings.adapter:
        with saving(work, "the adapter"):
            model = write_adapter(model, work / "adapter", stage.adapter_base(work), stage.adapter_base(stage.final))
    with saving(work, "the finished stage"):
        model.save_pretrained(work)
        for folder in (work, work / "adapter"):
            if folder.is_dir():
                write_manifest(folder, folder.glob("*.safetensors"))
        for folder in (work, *(saves(work) if stage.recipe.keep_saves else ())):
            processor.save_pretrained(folder)
        plot = plot_run([line for line in read_lines(work / "log.jsonl") if "loss" in line])
        plot.savefig(work / "run.png", dpi=110)
        plt.close(plot)
    work.rename(stage.final)
    if not stage.recipe.keep_saves:
        remove_saves(stage.final)
    return model
