"""Runs the stages of a recipe, each from the checkpoint of the one before.

A finished stage is a folder `<output>/stage1`, `stage2`, `stage3` or `dense` that loads by itself. While a stage runs, its folder has a
dot before its name and holds what
is needed to resume; it is renamed when it is complete, so a folder without a dot is never half written.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import LlavaForConditionalGeneration, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from moe_llava.checkpoints.load import load_checkpoint, load_on_meta
from moe_llava.data.batches import Collator, ConversationDataset
from moe_llava.data.records import Record, check_images, load_records
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaProcessor, upcycle
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.recipe import Recipe, RecipeError, Stage
from moe_llava.training.stages import active_parameters, choose_parameters
from moe_llava.training.trainer import ProgressDisplay, StageTrainer

TITLES = {
    "stage1": "stage I, the projector",
    "stage2": "stage II, projector and language model",
    "stage3": "stage III, experts and routers",
    "dense": "stage III of the dense control, the same FFNs",
}


def train(recipe: Recipe, stages: list[int], resume: bool, console: Console) -> list[Path]:
    """Runs `stages` (of 1, 2, 3) in order and returns their folders.

    Everything that can be wrong with recipe, data and first model is looked for before the first step. With `resume`, finished stages are
    kept and
    an unfinished one goes on from its last save; without it, a folder in the way is an error.

    Raises RecipeError, DataError, CheckpointError or ValueError, each naming what is wrong.
    """
    names = [stage_name(recipe, number) for number in stages]
    output = Path(recipe.output)
    if not resume:
        for name in names:
            if (output / name).exists() or (output / f".{name}").exists():
                raise RecipeError(f"{output / name} exists already, finished or not: go on with --resume, or choose another output")
    todo = [(number, name) for number, name in zip(stages, names, strict=True) if not (output / name).is_dir()]
    if todo:
        first = origin(recipe, todo[0][0])
        check_placement(recipe, load_on_meta(first))
        data = {name: read_data(stage_settings(recipe, number), console) for number, name in todo}
    for number, name in todo:
        run_stage(recipe, number, name, data[name], console)
    return [output / name for name in names]


def stage_name(recipe: Recipe, number: int) -> str:
    return "dense" if number == 3 and recipe.stage3.dense else f"stage{number}"


def stage_settings(recipe: Recipe, number: int) -> Stage:
    return (recipe.stage1, recipe.stage2, recipe.stage3)[number - 1]


def origin(recipe: Recipe, number: int) -> str:
    """The checkpoint that a stage starts from."""
    return recipe.model if number == 1 else str(Path(recipe.output) / f"stage{number - 1}")


def read_data(stage: Stage, console: Console) -> list[Record]:
    records = load_records(stage.data.file, stage.data.images)
    with console.status(f"looking at the images of {len(records):,} records of {stage.data.file}"):
        check_images(records)
    return records


def check_placement(recipe: Recipe, dense: PreTrainedModel) -> None:
    """Raises ValueError now if `dense` could not be upcycled as stage III says."""
    if isinstance(dense, MoeLlavaForConditionalGeneration):
        raise RecipeError(f"{recipe.model} is sparse already: the stages start from a dense LLaVA")
    with torch.device("meta"):
        MoeLlavaForConditionalGeneration(sparse_config(dense.config, **dataclasses.asdict(recipe.stage3.moe)))


def run_stage(recipe: Recipe, number: int, name: str, records: list[Record], console: Console) -> None:
    """Trains one stage and leaves `<output>/<name>`: model, processor, log.jsonl, recipe.yaml."""
    final = Path(recipe.output) / name
    work = final.with_name(f".{name}")
    work.mkdir(parents=True, exist_ok=True)
    set_seed(recipe.seed)
    model, processor = load_checkpoint(origin(recipe, number), dtype=torch.float32, attn_implementation=recipe.attention)
    moe_layers = _moe_layers(recipe, model)
    if name == "stage3":
        model = upcycle(model, **dataclasses.asdict(recipe.stage3.moe), seed=recipe.seed)
        processor = sparse_processor(processor)
    counts = choose_parameters(model, name, moe_layers)
    console.print(f"[bold]{TITLES[name]}[/bold]: {len(records):,} records, {counts}", highlight=False)

    settings = stage_settings(recipe, number).optimisation
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    arguments = training_arguments(recipe, settings, work)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=ConversationDataset(records, processor),
        data_collator=Collator(processor.tokenizer.pad_token_id),
        callbacks=[ProgressDisplay(name, console)],
        log_file=work / "log.jsonl",
    )
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(work)
    processor.save_pretrained(work)
    (work / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False), encoding="utf-8")
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    work.rename(final)
    console.print(f"{final}: {active_parameters(model):,} active parameters, {time.monotonic() - start:.0f} s", highlight=False)


def sparse_processor(processor: Any) -> MoeLlavaProcessor:
    """A LLaVA processor as one of the sparse model."""
    return MoeLlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    )


def training_arguments(recipe: Recipe, settings: Any, work: Path) -> TrainingArguments:
    """A stage's settings in transformers' words."""
    per_step = settings.per_device_batch_size
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=per_step,
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
        save_total_limit=1,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=recipe.dataloader_workers,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    processes = per_step * arguments.world_size
    if settings.batch_size % processes:
        raise RecipeError(f"batch_size is {settings.batch_size}, but must be a multiple of per_device_batch_size x processes = {processes}")
    arguments.gradient_accumulation_steps = settings.batch_size // processes
    return arguments


def use_bf16(precision: str) -> bool:
    """ "auto": on a GPU that has bfloat16, and on a CPU with instructions for it; elsewhere bfloat16 is slower than float32."""
    if precision == "auto":
        return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"


def _moe_layers(recipe: Recipe, dense: LlavaForConditionalGeneration) -> list[int]:
    config: MoeLlavaConfig = sparse_config(dense.config, **dataclasses.asdict(recipe.stage3.moe))
    return config.moe_layer_indices
