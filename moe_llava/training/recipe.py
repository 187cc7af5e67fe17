"""A recipe: one YAML file that says what is trained on what, and how, read into dataclasses. All its problems are reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers.integrations import get_available_reporting_integrations

from moe_llava.data.templates import TEMPLATES


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, a line each."""


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


@dataclass
class Moe:
    """What `upcycle` is given in stage III; see MoeLlavaConfig for the fields."""

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: str | list[int] = "interval"
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    capacity_factor: float | None = None
    use_residual: bool = False


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
class Stage:
    """`data`: one file, or several. `template`: a conversation form, a key of TEMPLATES in data/templates.py; None is the tokenizer's
    own. `max_length`: tokens, those of images included, after which a record is cut. `adapter`: what learns instead of the stage's own
    parameters; None trains these in full."""

    data: Data | list[Data]
    optimisation: Optimisation
    template: str | None = None
    max_length: int | None = None
    adapter: Adapter | None = None

    @property
    def sources(self) -> list[Data]:
        return self.data if isinstance(self.data, list) else [self.data]


@dataclass
class SparseStage(Stage):
    """Stage III. With `dense`, the FFNs that would have become experts are trained as they are: the control, with the same steps and
    data."""

    moe: Moe = field(default_factory=Moe)
    dense: bool = False


@dataclass
class Recipe:
    """`model` is a folder or hub id of a LLaVA with its processor, dense, or sparse for stage III alone; `precision` "bf16" computes in
    bfloat16 with float32 weights, "auto" does so where the machine is fast at it.

    `on_bad_record`: whether a record that cannot be read stops the run, or is left out; `report_to`: services of transformers' Trainer
    that draw curves, such as tensorboard, trackio, wandb; `save_total_limit`: the last saves that are kept.
    """

    model: str
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
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 1
    dataloader_workers: int = 0


def load_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe; `overrides` are "a.b=value" with a YAML value.

    Raises RecipeError, with every problem found: file missing, unknown or missing keys, values of the wrong type, settings that do not
    fit together.
    """
    file = Path(file)
    if not file.is_file():
        raise RecipeError(f"recipe {file} does not exist")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{file} must hold a mapping of settings, but holds {type(raw).__name__}")
    problems: list[str] = []
    for override in overrides or []:
        _override(raw, override, problems)
    recipe = _build(Recipe, raw, "", problems)
    if not problems:
        problems += _rules(recipe)
    if problems:
        raise RecipeError(f"{file}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string, for want of a dot; this reads it as the number that everybody means."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _override(raw: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        problems.append(f"--set {override}: expected a.b=value")
        return
    *parents, key = path.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            problems.append(f"--set {override}: {parent} holds a value, not settings")
            return
    try:
        raw[key] = yaml.load(value, _Loader)
    except yaml.YAMLError:
        problems.append(f"--set {override}: {value!r} is not YAML")


def _build(kind: Any, raw: Any, where: str, problems: list[str]) -> Any:
    """An instance of the dataclass `kind` from a mapping; what is wrong goes into `problems`."""
    if not isinstance(raw, dict):
        problems.append(f"{where or 'recipe'} must be a mapping of settings, but is {raw!r}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in raw.keys() - fields.keys():
        guess = difflib.get_close_matches(str(key), fields, n=1)
        problems.append(f"unknown key {where}{key}" + (f"; did you mean {where}{guess[0]}?" if guess else f"; known: {', '.join(fields)}"))
    values = {}
    for name, f in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], where + name, problems)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            problems.append(f"{where}{name} is missing")
    return None if problems else kind(**values)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    kinds = [kind for kind in typing.get_args(hint) or [hint] if dataclasses.is_dataclass(kind)]
    if kinds and isinstance(value, list) and any(typing.get_origin(kind) is list for kind in typing.get_args(hint)):
        return [_build(kinds[0], item, f"{where}.{index}.", problems) for index, item in enumerate(value)]
    if kinds and value is not None:
        return _build(kinds[0], value, where + ".", problems)
    if not _fits(hint, value):
        expected = hint.__name__ if isinstance(hint, type) else str(hint)
        if typing.get_origin(hint) is Literal:
            expected = f"one of {', '.join(typing.get_args(hint))}"
        problems.append(f"{where} is {value!r}, but must be {expected}")
    return float(value) if hint is float and isinstance(value, int) else value


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _rules(recipe: Recipe) -> list[str]:
    """What a type cannot say."""
    problems = []
    for name in ("stage1", "stage2", "stage3"):
        if getattr(recipe, name) is None:
            continue
        settings = getattr(recipe, name).optimisation
        template = getattr(recipe, name).template
        if template is not None and template not in TEMPLATES:
            problems.append(f"{name}.template is {template!r}, but must be one of {', '.join(TEMPLATES)}, or null for the tokenizer's own")
        max_length = getattr(recipe, name).max_length
        if max_length is not None and max_length < 1:
            problems.append(f"{name}.max_length is {max_length}, but must be at least 1, or null to cut nothing")
        if not getattr(recipe, name).sources:
            problems.append(f"{name}.data is an empty list, but must name at least one file")
        for source in getattr(recipe, name).sources:
            if source.weight <= 0:
                problems.append(f"{name}.data has weight {source.weight} for {source.file}, but it must be above 0")
        for key in ("learning_rate", "batch_size", "per_device_batch_size", "epochs", "max_grad_norm"):
            if getattr(settings, key) <= 0:
                problems.append(f"{name}.optimisation.{key} is {getattr(settings, key)}, but must be above 0")
        if settings.max_steps == 0 or settings.max_steps < -1:
            problems.append(f"{name}.optimisation.max_steps is {settings.max_steps}, but must be above 0, or -1 to go by epochs")
        if not 0 <= settings.warmup_ratio < 1:
            problems.append(f"{name}.optimisation.warmup_ratio is {settings.warmup_ratio}, but must lie in 0..1")
        if settings.per_device_batch_size > 0 and settings.batch_size % settings.per_device_batch_size:
            problems.append(
                f"{name}.optimisation.batch_size is {settings.batch_size}, but must be a multiple of "
                f"per_device_batch_size={settings.per_device_batch_size}"
            )
        problems += _adapter_rules(name, getattr(recipe, name))
    for name in recipe.report_to:
        if name not in get_available_reporting_integrations():
            problems.append(f"report_to names {name!r}, which transformers does not know or which is not installed")
    for key in ("logging_steps", "save_steps", "save_total_limit"):
        if getattr(recipe, key) < 1:
            problems.append(f"{key} is {getattr(recipe, key)}, but must be at least 1")
    moe = recipe.stage3.moe
    if moe.capacity_factor is not None and moe.capacity_factor <= 0:
        problems.append(f"stage3.moe.capacity_factor is {moe.capacity_factor}, but must be above 0, or null to drop no token")
    if not 1 <= moe.num_experts_per_tok <= moe.num_experts:
        problems.append(f"stage3.moe.num_experts_per_tok is {moe.num_experts_per_tok}, but must lie in 1..num_experts={moe.num_experts}")
    return problems


def _adapter_rules(name: str, stage: Stage) -> list[str]:
    adapter, where = stage.adapter, f"{name}.adapter"
    if adapter is None:
        return []
    if name == "stage1":
        return [f"{where} is set, but stage I trains only the projector, and in full: leave it out"]
    problems = []
    if isinstance(stage, SparseStage) and stage.dense:
        problems.append(f"{where} is set, but stage3.dense is true, and the dense control trains its FFNs in full")
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
