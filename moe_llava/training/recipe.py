"""A recipe: one YAML file that says what is trained on what, and how, read into dataclasses. All its problems are reported at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_llava.data.templates import TEMPLATES
from moe_llava.model.options import MoeOptions
from moe_llava.training.parsing import RecipeError, apply_override, build, read


@dataclass
class Data:
    """A data file, and the folder that its image names are relative to. `weight`: how often an epoch sees each record; 0.5 takes half of
    them, chosen by the recipe's seed, 2 takes all of them twice."""

    file: str
    images: str
    weight: float = 1.0


@dataclass
class Optimisation:
    """AdamW with warm-up and cosine decay. `batch_size` is what one step sees, in all processes and accumulation steps together."""

    learning_rate: float
    batch_size: int
    per_device_batch_size: int
    epochs: float = 1.0
    max_steps: int = -1  # above 0: stop there, whatever `epochs` says
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    group_by_length: bool = False  # batches of one modality and about one length; else records come in random order
    packing: bool = False  # the samples that a process computes at once stand in one row, without padding, and do not see each other


ADAPTER_TARGETS = ("attention", "FFN", "experts", "routers")
QUANTISATIONS = ("nf4", "int8")


@dataclass
class Adapter:
    """LoRA on parts of the language model (ADAPTER_TARGETS; routers learn in full), all else of which is frozen. `quantisation`, one of
    QUANTISATIONS, is of its frozen linear layers. `continue_from`: an adapter folder to go on from; the stage then starts from that
    adapter's base, and not from the stage before."""

    targets: list[str]
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    use_dora: bool = False
    quantisation: str | None = None
    continue_from: str | None = None


@dataclass
class Parts:
    """What a dense LLaVA is joined from, each a folder or hub id. `template`: the conversation form of its chat template, a key of
    TEMPLATES in data/templates.py; None keeps the tokenizer's own."""

    language_model: str
    vision_tower: str
    template: str | None = None


@dataclass
class Stage:
    """`data`: one file, or several. `template`: a conversation form, a key of TEMPLATES in data/templates.py; None is the tokenizer's
    own. `max_length`: tokens, those of images included, after which a record is cut. `image_aspect_ratio`: "pad" pads images to a square
    with the tower's mean colour, "square" resizes and crops them as the tower's preprocessing does; None leaves the processor as it is.
    `adapter`: what learns instead of the stage's own parameters; None trains these in full."""

    data: Data | list[Data]
    optimisation: Optimisation
    template: str | None = None
    max_length: int | None = None
    image_aspect_ratio: Literal["pad", "square"] | None = None
    adapter: Adapter | None = None

    @property
    def sources(self) -> list[Data]:
        return self.data if isinstance(self.data, list) else [self.data]


@dataclass
class SparseStage(Stage):
    """Stage III. `tuned`: whether experts and routers learn, or all that does in stage II, too. `expert_start`: whether the experts begin
    as copies of their FFN, or as such with noise; see `upcycle`. With `dense`, the FFNs that would have become experts are trained as they
    are: the control, with the same steps and data."""

    moe: MoeOptions = field(default_factory=MoeOptions)
    tuned: Literal["experts", "all"] = "experts"
    expert_start: Literal["copy", "noise"] = "copy"
    dense: bool = False


@dataclass
class Sharding:
    """FSDP2: each of the `fsdp_size` processes keeps its part of every parameter, gradient and moment. With `ep_size` above 1 the experts
    of stage III stay whole: groups of `ep_size` processes share them out, and tokens travel to them."""

    fsdp_size: int
    ep_size: int = 1


@dataclass
class Recipe:
    """`model` is a folder or hub id of a LLaVA with its processor, dense, or sparse for stage III alone; or what a dense one is joined
    from. `precision` "bf16" computes in bfloat16 with float32 weights, "auto" does so where the machine is fast at it.

    `on_bad_record`: whether a record that cannot be read stops the run, or is left out; `report_to`: services of transformers' Trainer
    that draw curves, such as tensorboard, trackio, wandb; `save_total_limit`: the last saves that are kept; `feature_cache`: a folder in
    which the tower's features of an image are kept, for epochs, stages and runs to come; None computes them each time.
    """

    model: str | Parts
    output: str
    stage3: SparseStage
    stage1: Stage | None = None  # absent where the model has been through it
    stage2: Stage | None = None
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    attention: str | None = None  # an attention implementation of transformers; None is its default
    torch_compile: bool = False
    on_bad_record: Literal["stop", "skip"] = "stop"
    report_to: list[str] = field(default_factory=list)
    sharding: Sharding | None = None  # None: every process keeps the whole model
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 1
    dataloader_workers: int = 0
    feature_cache: str | None = None


def load_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe; `overrides` are "a.b=value" with a YAML value. A recipe may name another one as its `base`, and say only what
    differs.

    Raises RecipeError, with every problem found: file missing, unknown or missing keys, values of the wrong type, settings that do not
    fit together.
    """
    recipe = read_recipe(file, overrides)
    problems = _rules(recipe)
    if problems:
        raise _problems(file, problems)
    return recipe


def read_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The same, but whether the settings go together is not asked: of a recipe that has been run already."""
    raw = read(Path(file))
    problems: list[str] = []
    for override in overrides or []:
        apply_override(raw, override, problems)
    recipe = build(Recipe, raw, "", problems)
    if problems:
        raise _problems(file, problems)
    return recipe


def _problems(file: str | Path, problems: list[str]) -> RecipeError:
    return RecipeError(f"{file}:\n" + "\n".join(f"  {problem}" for problem in problems))


def _rules(recipe: Recipe) -> list[str]:
    """What a type cannot say."""
    problems = []
    if isinstance(recipe.model, Parts) and recipe.model.template not in (None, *TEMPLATES):
        template = recipe.model.template
        problems.append(f"model.template is {template!r}, but must be one of {_names(TEMPLATES)}, or null for the tokenizer's own")
    for number in stages_of(recipe):
        problems += _stage_rules(f"stage{number}", stage_settings(recipe, number))
    if recipe.report_to:
        problems += _report_rules(recipe.report_to)
    for key in ("seed", "dataloader_workers"):
        if not 0 <= getattr(recipe, key) < 2**32:
            problems.append(f"{key} is {getattr(recipe, key)}, but must lie in 0..2^32 - 1")
    for key in ("logging_steps", "save_steps", "save_total_limit"):
        if getattr(recipe, key) < 1:
            problems.append(f"{key} is {getattr(recipe, key)}, but must be at least 1")
    if recipe.sharding is not None:
        problems += _sharding_rules(recipe, recipe.sharding)
    return problems


def _report_rules(names: list[str]) -> list[str]:
    from transformers.integrations import get_available_reporting_integrations  # takes seconds, and few recipes name any

    known = get_available_reporting_integrations()
    return [f"report_to names {name!r}, which transformers does not know or which is not installed" for name in names if name not in known]


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _stage_rules(name: str, stage: Stage) -> list[str]:
    problems, settings = [], stage.optimisation
    if stage.template not in (None, *TEMPLATES):
        problems.append(f"{name}.template is {stage.template!r}, but must be one of {_names(TEMPLATES)}, or null for the tokenizer's own")
    if stage.max_length is not None and stage.max_length < 1:
        problems.append(f"{name}.max_length is {stage.max_length}, but must be at least 1, or null to cut nothing")
    if not stage.sources:
        problems.append(f"{name}.data is an empty list, but must name at least one file")
    for source in stage.sources:
        if source.weight <= 0:
            problems.append(f"{name}.data has weight {source.weight} for {source.file}, but it must be above 0")
    for key in ("learning_rate", "batch_size", "per_device_batch_size", "epochs", "max_grad_norm"):
        if getattr(settings, key) <= 0:
            problems.append(f"{name}.optimisation.{key} is {getattr(settings, key)}, but must be above 0")
    if settings.max_steps == 0 or settings.max_steps < -1:
        problems.append(f"{name}.optimisation.max_steps is {settings.max_steps}, but must be above 0, or -1 to go by epochs")
    if settings.weight_decay < 0:
        problems.append(f"{name}.optimisation.weight_decay is {settings.weight_decay}, but must be 0 or above")
    if not 0 <= settings.warmup_ratio < 1:
        problems.append(f"{name}.optimisation.warmup_ratio is {settings.warmup_ratio}, but must lie in 0..1")
    if settings.per_device_batch_size > 0 and settings.batch_size % settings.per_device_batch_size:
        problems.append(
            f"{name}.optimisation.batch_size is {settings.batch_size}, but must be a multiple of "
            f"per_device_batch_size={settings.per_device_batch_size}"
        )
    if isinstance(stage, SparseStage):
        problems += [f"{name}.moe.{problem}" for problem in stage.moe.moe_problems()]
    return problems + ([] if stage.adapter is None else _adapter_rules(name, stage, stage.adapter))


def _sharding_rules(recipe: Recipe, sharding: Sharding) -> list[str]:
    problems, num_experts = [], recipe.stage3.moe.num_experts
    if recipe.feature_cache is not None:
        problems.append("sharding is set, but so is feature_cache, which asks one process for the whole tower: leave one of them out")
    if any(stage_settings(recipe, number).adapter for number in stages_of(recipe)):
        problems.append("sharding is set, but so is an adapter, whose frozen base every process keeps as a whole: leave one of them out")
    if sharding.fsdp_size < 2:
        problems.append(f"sharding.fsdp_size is {sharding.fsdp_size}, but must be at least 2; leave sharding out for one process")
    if sharding.ep_size < 1 or sharding.fsdp_size % sharding.ep_size:
        problems.append(f"sharding.ep_size is {sharding.ep_size}, but must be at least 1 and divide fsdp_size={sharding.fsdp_size}")
    elif num_experts % sharding.ep_size:
        problems.append(f"sharding.ep_size is {sharding.ep_size}, but must divide stage3.moe.num_experts={num_experts}")
    return problems


def _adapter_rules(name: str, stage: Stage, adapter: Adapter) -> list[str]:
    where = f"{name}.adapter"
    if name == "stage1":
        return [f"{where} is set, but stage I trains only the projector, and in full: leave it out"]
    problems = []
    if isinstance(stage, SparseStage) and stage.dense:
        problems.append(f"{where} is set, but stage3.dense is true, and the dense control trains its FFNs in full")
    if isinstance(stage, SparseStage) and stage.tuned == "all":
        problems.append(f"{where} is set, but stage3.tuned is all, and an adapter's targets say what learns: leave one of them out")
    if isinstance(stage, SparseStage) and stage.moe.routing == "smoes":
        problems.append(
            f"{where} is set, but stage3.moe.routing is smoes, whose running statistics an adapter would not hold: leave it out"
        )
    allowed = ADAPTER_TARGETS if isinstance(stage, SparseStage) else ("attention", "FFN")
    wrong = [target for target in adapter.targets if target not in allowed]
    if wrong:
        only = "" if isinstance(stage, SparseStage) else "; only stage III has experts and routers"
        problems.append(f"{where}.targets names {', '.join(wrong)}, but must name some of {', '.join(allowed)}{only}")
    elif not set(adapter.targets) - {"routers"}:
        problems.append(f"{where}.targets is {adapter.targets}, but must name attention, FFN or experts: LoRA needs a matrix to adapt")
    if "experts" in adapter.targets and adapter.dropout:
        problems.append(
            f"{where}.dropout is {adapter.dropout}, but must be 0 with experts among the targets: "
            "LoRA is added to the stacked weights before they meet an input that could be dropped"
        )
    if "experts" in adapter.targets and adapter.use_dora:
        problems.append(f"{where}.use_dora is true, but must be false with experts among the targets: PEFT has no DoRA for stacked weights")
    for key in ("rank", "alpha"):
        if getattr(adapter, key) < 1:
            problems.append(f"{where}.{key} is {getattr(adapter, key)}, but must be at least 1")
    if not 0 <= adapter.dropout < 1:
        problems.append(f"{where}.dropout is {adapter.dropout}, but must lie in 0..1")
    if adapter.quantisation not in (None, *QUANTISATIONS):
        problems.append(
            f"{where}.quantisation is {adapter.quantisation!r}, but must be one of {', '.join(QUANTISATIONS)}, or null for none"
        )
    return problems


def stage_settings(recipe: Recipe, number: int) -> Stage:
    stage = (recipe.stage1, recipe.stage2, recipe.stage3)[number - 1]
    if stage is None:
        raise RecipeError(f"the recipe has no stage{number}")
    return stage


def stage_name(recipe: Recipe, number: int) -> str:
    return "dense" if number == 3 and recipe.stage3.dense else f"stage{number}"


def learning_stage(recipe: Recipe, number: int) -> str:
    """The key of STAGES in stages.py that says what learns."""
    return "stage2" if number == 3 and recipe.stage3.tuned == "all" else stage_name(recipe, number)


def stages_of(recipe: Recipe) -> list[int]:
    """The numbers of the stages that a recipe has."""
    return [number for number, stage in ((1, recipe.stage1), (2, recipe.stage2), (3, recipe.stage3)) if stage is not None]
