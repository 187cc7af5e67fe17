"""Runs the stages of a recipe, each from the checkpoint of the one before.

A finished stage is a folder `<output>/stage1`, `stage2`, `stage3` or `dense` that loads by itself. While a stage runs, its folder has a
dot before its name and holds what is needed to resume; it is renamed when it is complete, so a folder without a dot is never half written.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from transformers import LlavaForConditionalGeneration, TrainingArguments, set_seed

from moe_llava.checkpoints.folders import new_folder
from moe_llava.checkpoints.load import CheckpointError, load_checkpoint, load_config, load_on_meta
from moe_llava.data.batches import Collator, ConversationDataset, EmptyImage
from moe_llava.data.records import DataError
from moe_llava.data.sampling import GroupedSampler
from moe_llava.data.store import Records, joined, load_records, weighted
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaProcessor, upcycle
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.adapters import attach, base_of, check_adapter, describe_base, load_base, write_adapter
from moe_llava.training.budget import active_parameters, on_meta
from moe_llava.training.recipe import Recipe, RecipeError, Stage
from moe_llava.training.saves import Stopped, StopWhenAsked, read_lines, saves, saving, work_folder, write_whole
from moe_llava.training.stages import STAGES, choose_parameters
from moe_llava.training.trainer import StageTrainer
from moe_llava.training.watch import ProgressDisplay, plot_run

TITLES = {
    "stage1": "stage I, the projector",
    "stage2": "stage II, projector and language model",
    "stage3": "stage III, experts and routers",
    "dense": "stage III of the dense control, the same FFNs",
}


def train(recipe: Recipe, stages: list[int], resume: bool, console: Console) -> list[Path]:
    """Runs `stages` (of 1, 2, 3) in order and returns their folders.

    Everything that can be wrong with recipe, data and first model is looked for before the first step. With `resume`, finished stages
    are kept and an unfinished one goes on from its last save; without it, a folder in the way is an error.

    Raises RecipeError, DataError, CheckpointError or ValueError, each naming what is wrong.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not state.is_main_process:
        console = Console(quiet=True)
    for number in stages:
        stage_settings(recipe, number)  # raises if the recipe has no such stage
    names = [stage_name(recipe, number) for number in stages]
    output = Path(recipe.output)
    todo = [(number, name) for number, name in zip(stages, names, strict=True) if not (output / name).is_dir()]
    for name in names:
        check_folder(recipe, output / name, resume)
        if (output / name).is_dir():
            console.print(f"{output / name}: finished, kept", highlight=False, soft_wrap=True)
    if todo:
        data = check_everything(recipe, dict(todo))
    state.wait_for_everyone()  # nobody makes a folder before everybody has looked
    for number, name in todo:
        run_stage(recipe, number, name, data[name], console)
        state.wait_for_everyone()
    return [output / name for name in names]


def stage_name(recipe: Recipe, number: int) -> str:
    return "dense" if number == 3 and recipe.stage3.dense else f"stage{number}"


def stage_settings(recipe: Recipe, number: int) -> Stage:
    stage = (recipe.stage1, recipe.stage2, recipe.stage3)[number - 1]
    if stage is None:
        raise RecipeError(f"the recipe has no stage{number}")
    return stage


def stages_of(recipe: Recipe) -> list[int]:
    """The numbers of the stages that a recipe has."""
    return [number for number, stage in ((1, recipe.stage1), (2, recipe.stage2), (3, recipe.stage3)) if stage is not None]


def origin(recipe: Recipe, number: int) -> str:
    """The checkpoint that a stage starts from: the one before it, or the recipe's model, or the base of an adapter to go on from. A model
    that is sparse already is where stage III goes on."""
    adapter = stage_settings(recipe, number).adapter
    if adapter and adapter.continue_from:
        return base_of(adapter.continue_from)
    before = Path(recipe.output) / f"stage{number - 1}"
    if number == 1 or (number == 3 and not before.is_dir() and isinstance(load_config(recipe.model), MoeLlavaConfig)):
        return recipe.model
    return str(before)


def check_folder(recipe: Recipe, final: Path, resume: bool) -> None:
    """Raises RecipeError if the stage's folder is in the way, or was made with other settings."""
    for folder in (final, work_folder(final)):
        if not folder.exists():
            continue
        if not resume:
            raise RecipeError(f"{final} exists already, finished or not: go on with --resume, or choose another output")
        if not (folder / "recipe.yaml").is_file():
            continue  # it was stopped before it had begun
        before = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        now = _what_counts(recipe, final.name)
        before = _flatten(before)
        names = [*now, *(name for name in before if name.startswith(f"{final.name}.adapter.") and name not in now)]  # taken out since
        changed = [f"{name} {before.get(name)}, now {now.get(name)}" for name in names if before.get(name) != now.get(name)]
        if changed:
            raise RecipeError(f"{final} was made with {'; '.join(changed)}: choose another output, or remove it")


def check_everything(recipe: Recipe, todo: dict[int, str]) -> dict[str, Records]:
    """Raises what `train` promises for all stages to come; returns the records of each."""
    for number in todo:
        adapter = stage_settings(recipe, number).adapter
        if number - 1 not in todo or (adapter and adapter.continue_from):
            path = origin(recipe, number)
            check_start(recipe, number, path)
        if adapter:
            check_adapter(adapter, todo[number], start_on_meta(recipe, number, path))
        training_arguments(recipe, stage_settings(recipe, number), work_folder(Path(recipe.output) / todo[number]))
    data = {}
    for number, name in todo.items():
        data[name] = joined(
            weighted(load_records(source.file, source.images), source.weight, recipe.seed)
            for source in stage_settings(recipe, number).sources
        )
        without = np.flatnonzero(data[name].image_counts() == 0)
        if name == "stage1" and len(without):
            source = data[name][without[0]].source
            raise DataError(f"{source} has no image, but stage I teaches the projector, which sees nothing else")
    return data


# Of what a sparse model is, these are in its weights; the rest may change from run to run.
STRUCTURE = ("num_experts", "moe_layers", "use_residual")


def check_start(recipe: Recipe, number: int, path: str) -> None:
    """Raises CheckpointError, RecipeError or ValueError now if a stage cannot start from `path`, or stage III could not make it sparse."""
    if path == str(Path(recipe.output) / f"stage{number - 1}") and not Path(path).is_dir():
        raise CheckpointError(f"stage {number} starts from {path}, which does not exist: run stage {number - 1} first")
    model = load_on_meta(path)
    if not isinstance(model, MoeLlavaForConditionalGeneration):
        on_meta(sparse_config(model.config, **dataclasses.asdict(recipe.stage3.moe)))
        return
    if number != 3:
        raise RecipeError(f"{path} is sparse already: only stage III can go on from it (--stage 3)")
    if recipe.stage3.dense:
        raise RecipeError(f"{path} is sparse already, but stage3.dense asks for the dense control, which starts from a dense LLaVA")
    wanted = MoeLlavaConfig(**model.config.to_dict() | dataclasses.asdict(recipe.stage3.moe))
    for name in STRUCTURE:
        attribute = "moe_layer_indices" if name == "moe_layers" else name
        has, asked = getattr(model.config, attribute), getattr(wanted, attribute)
        if has != asked:
            raise RecipeError(f"{path} has {name} {has}, but stage3.moe.{name} says {asked}, and its weights cannot change that")


def run_stage(recipe: Recipe, number: int, name: str, records: Records, console: Console) -> None:
    """Trains one stage and leaves `<output>/<name>`: model, processor, log.jsonl, recipe.yaml."""
    final = Path(recipe.output) / name
    work = work_folder(final)
    set_seed(recipe.seed)
    settings = stage_settings(recipe, number)
    arguments = training_arguments(recipe, settings, work)
    model, processor = (start_frozen if settings.adapter else start_model)(recipe, number, name)
    moe_layers = _moe_layers(recipe, model)
    if name == "stage3" and arguments.bf16:
        # The grouped backend is not autocast: with float32 weights it would compute in float32.
        model.set_experts_implementation("eager")
    if settings.optimisation.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.adapter:
        console.print(describe_base(model, settings.adapter), highlight=False, soft_wrap=True)
        model, counts = attach(model, settings.adapter, name, base_of_stage(recipe, number, name, work))
    else:
        counts = choose_parameters(model, name, moe_layers)
    console.print(f"[bold]{TITLES[name]}[/bold]: {len(records):,} records, {counts}", highlight=False, soft_wrap=True)
    display = ProgressDisplay(name, console)
    image = EmptyImage.of(processor)
    with StopWhenAsked() as stop:
        trainer = StageTrainer(
            model=model,
            args=arguments,
            train_dataset=ConversationDataset(records, processor, settings.template, settings.max_length),
            data_collator=Collator(
                processor.tokenizer.pad_token_id, image if "projector" in STAGES[name] else None, settings.optimisation.packing
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
        try:
            trainer.train(resume_from_checkpoint=str(saves(work)[-1]) if saves(work) else None)
        finally:
            display.progress.stop()
    if trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"{name} stopped as asked after step {trainer.state.global_step} of {trainer.state.max_steps}: go on with --resume")
    if trainer.is_world_process_zero():
        if settings.adapter:
            with saving(work, "the adapter"):
                model = write_adapter(model, work / "adapter", *(base_of_stage(recipe, number, name, folder) for folder in (work, final)))
        finish(work, final, model, processor)
        console.print(f"{final}: {active_parameters(model):,} active parameters", highlight=False, soft_wrap=True)


def write_recipe(recipe: Recipe, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def start_on_meta(recipe: Recipe, number: int, path: str) -> LlavaForConditionalGeneration:
    """The structure that a stage starts with, if `path` is where it comes from, or where an earlier stage does."""
    model = load_on_meta(path)
    if number != 3 or isinstance(model, MoeLlavaForConditionalGeneration):
        return model
    return on_meta(sparse_config(model.config, **dataclasses.asdict(recipe.stage3.moe)))


def base_of_stage(recipe: Recipe, number: int, name: str, folder: Path) -> str:
    """The checkpoint that a stage's adapter belongs to: the one that the stage starts from, or, where that has to become sparse or to take
    other settings, the one that `start_frozen` writes into the stage's `folder`."""
    path = origin(recipe, number)
    config = load_config(path)
    moe = {key: value for key, value in dataclasses.asdict(recipe.stage3.moe).items() if key not in STRUCTURE}
    if name != "stage3" or (isinstance(config, MoeLlavaConfig) and all(getattr(config, key) == value for key, value in moe.items())):
        return path
    return str(folder / "base")


def start_frozen(recipe: Recipe, number: int, name: str) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model, processor) as a stage with an adapter starts with them: in float32 but for what is quantised."""
    work = work_folder(Path(recipe.output) / name)
    base = base_of_stage(recipe, number, name, work)
    with PartialState().main_process_first():
        if base == str(work / "base") and not Path(base).is_dir():
            model, processor = start_model(recipe, number, name)
            write_recipe(recipe, work)  # a run that is resumed takes the base as it is, so its settings must be known
            with saving(work, "the base of the adapter"), new_folder(Path(base)) as folder:
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
    adapter = stage_settings(recipe, number).adapter
    assert adapter is not None
    return load_base(base, adapter, torch.bfloat16 if use_bf16(recipe.precision) else torch.float32, recipe.attention)


def make_sampler(settings: Stage, records: Records, image_tokens: int, arguments: TrainingArguments) -> GroupedSampler | None:
    """None is Trainer's own random order."""
    if not settings.optimisation.group_by_length:
        return None
    lengths = np.minimum(records.lengths(image_tokens), settings.max_length or np.iinfo(np.int64).max)
    has_image = records.image_counts() > 0
    return GroupedSampler(lengths, has_image, arguments.train_batch_size, arguments.world_size, arguments.seed)


def finish(work: Path, final: Path, model: LlavaForConditionalGeneration, processor: Any) -> None:
    """Writes what a finished stage is, and gives its folder its name. The saves go last: until then, a run can go on from them."""
    with saving(work, "the finished stage"):
        model.save_pretrained(work)
        processor.save_pretrained(work)
        plot = plot_run([line for line in read_lines(work / "log.jsonl") if "loss" in line])
        plot.savefig(work / "run.png", dpi=110)
        plt.close(plot)
    for save in saves(work):
        shutil.rmtree(save)
    work.rename(final)


def start_model(recipe: Recipe, number: int, name: str) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model, processor) as the stage starts with them: in float32, sparse in stage III."""
    path = origin(recipe, number)
    moe = dataclasses.asdict(recipe.stage3.moe)
    changes: dict[str, Any] = {}
    if isinstance(load_config(path), MoeLlavaConfig):
        changes = {name: value for name, value in moe.items() if name not in STRUCTURE}
    model, processor = load_checkpoint(path, dtype=torch.float32, attn_implementation=recipe.attention, **changes)
    if name == "stage3" and not changes:
        return upcycle(model, **moe, seed=recipe.seed), MoeLlavaProcessor.from_llava(processor)
    return model, processor


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
    at_once = arguments.train_batch_size * arguments.world_size
    if settings.batch_size % at_once:
        raise RecipeError(
            f"batch_size is {settings.batch_size}, but must be a multiple of what all {at_once // settings.per_device_batch_size} devices "
            f"compute at once, {at_once}"
        )
    arguments.gradient_accumulation_steps = settings.batch_size // at_once
    return arguments


def use_bf16(precision: str) -> bool:
    """ "auto": on a GPU that has bfloat16, and on a CPU with instructions for it; elsewhere bfloat16 is slower than float32."""
    if precision == "auto":
        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"


def _moe_layers(recipe: Recipe, model: LlavaForConditionalGeneration) -> list[int]:
    """The layers that are, or would be, sparse."""
    if isinstance(model, MoeLlavaForConditionalGeneration):
        return model.config.moe_layer_indices
    return sparse_config(model.config, **dataclasses.asdict(recipe.stage3.moe)).moe_layer_indices


def _what_counts(recipe: Recipe, name: str) -> dict[str, Any]:
    """The settings that decide what a stage's folder holds."""
    whole = dataclasses.asdict(recipe)
    stage = "stage3" if name == "dense" else name
    return _flatten({key: whole[key] for key in ("model", "seed", "precision", "attention", "torch_compile", stage)})


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
