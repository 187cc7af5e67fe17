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
    with the tower's mean colour, "square" resizes and crops them as the tower's preprocessing does; None leaves the processor as it is."""

    data: Data | list[Data]
    optimisation: Optimisation
    template: str | None = None
    max_length: int | None = None
    image_aspect_ratio: Literal["pad", "square"] | None = None

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
    that draw curves, such as tensorboard, trackio, wandb; `save_total_limit`: the last saves that are kept.
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


def load_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe; `overrides` are "a.b=value" with a YAML value. A recipe may name another one as its `base`, and say only what
    differs.

    Raises RecipeError, with every problem found: file missing, unknown or missing keys, values of the wrong type, settings that do not
    fit together.
    """
    file = Path(file)
    raw = _read(file)
    problems: list[str] = []
    for override in overrides or []:
        _override(raw, override, problems)
    recipe = _build(Recipe, raw, "", problems)
    if not problems:
        problems += _rules(recipe)
    if problems:
        raise RecipeError(f"{file}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


def _read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a file, over those of the file that it names as `base`, relative to its own place. `above`: what names it so."""
    if not file.is_file():
        raise RecipeError(f"recipe {file} does not exist")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{file} must hold a mapping of settings, but holds {type(raw).__name__}")
    if "base" not in raw:
        return raw
    base = file.parent / str(raw.pop("base"))
    if not base.is_file():
        raise RecipeError(f"{file} has base {base}, which does not exist")
    if base.resolve() in (chain := (*above, file.resolve())):
        raise RecipeError(f"{file} has base {base}, which is based on it in turn")
    return _over(_read(base, chain), raw)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, mapping by mapping; where both have a value, that of `above`."""
    nested = {key: _over(below[key], value) for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return below | above | nested


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
    if isinstance(value, str) and str in typing.get_args(hint):
        return value
    if kinds and isinstance(value, list) and any(typing.get_origin(kind) is list for kind in typing.get_args(hint)):
        return [_build(kinds[0], item, f"{where}.{index}.", problems) for index, item in enumerate(value)]
    if kinds and value is not None:
        return _build(kinds[0], value, where + ".", problems)
    if not _fits(hint, value):
        expected = hint.__name__ if isinstance(hint, type) else str(hint)
        choices = [
            choice for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)
        ]
        if choices:
            expected = f"one of {', '.join(choices)}"
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
    if isinstance(recipe.model, Parts) and recipe.model.template not in (None, *TEMPLATES):
        problems.append(
            f"model.template is {recipe.model.template!r}, but must be one of {', '.join(TEMPLATES)}, or null for the tokenizer's own"
        )
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
    return problems + _sharding_rules(recipe.sharding, moe.num_experts)


def _sharding_rules(sharding: Sharding | None, num_experts: int) -> list[str]:
    if sharding is None:
        return []
    problems = []
    if sharding.fsdp_size < 2:
        problems.append(f"sharding.fsdp_size is {sharding.fsdp_size}, but must be at least 2; leave sharding out for one process")
    if sharding.ep_size < 1 or sharding.fsdp_size % sharding.ep_size:
        problems.append(f"sharding.ep_size is {sharding.ep_size}, but must be at least 1 and divide fsdp_size={sharding.fsdp_size}")
    elif num_experts % sharding.ep_size:
        problems.append(f"sharding.ep_size is {sharding.ep_size}, but must divide stage3.moe.num_experts={num_experts}")
    return problems
