"""Count what a model costs, on the meta device: parameters by part, arithmetic, cache, and memory in training.

A token goes through all parameters but those of the experts it is not routed to (the paper's "activated"). One multiplication and one
addition are two FLOPs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_llava.checkpoints.families import published_family
from moe_llava.checkpoints.files import read_config
from moe_llava.checkpoints.load import load_on_meta
from moe_llava.checkpoints.published import inspect_published
from moe_llava.checkpoints.separate import separate_experts
from moe_llava.model import SparseModel
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.adapters import attach, cast_frozen, cast_saves, quantisation_saves, without_adapter
from moe_llava.training.memory import Batch, activations, layout_of
from moe_llava.training.parts import (
    PARTS,
    attention_of,
    backbone_name,
    decoder_layers,
    is_native,
    moe_layers,
    native_experts,
    parts_of,
    vision_names,
)
from moe_llava.training.recipe import Adapter, Recipe
from moe_llava.training.stage import Stage, load_structure, on_meta
from moe_llava.training.trainable import choose_parameters

CONTEXT = 2048  # tokens that the counted token attends to; the text length of the paper


@dataclass(frozen=True)
class Budget:
    """`total`, `active`: parameters by part; a patch uses the active ones of tower and projector. `flops`: the language model's forward
    pass for one token, at CONTEXT. `cache_bytes`: keys and values of one token, in bfloat16. `moe_layers`: indices; `vision`: labels of
    sparse FFNs outside the language model; `experts`: (in a layer, used by a token), or None for a dense model."""

    layers: int
    moe_layers: list[int]
    vision: list[str]
    experts: tuple[int, int] | None
    total: dict[str, int]
    active: dict[str, int]
    flops: int
    cache_bytes: int

    @property
    def language_model(self) -> tuple[int, int]:
        """Return (total, active) without tower and projector, as the paper counts."""
        total, active = (sum(counted.values()) - counted["tower"] - counted["projector"] for counted in (self.total, self.active))
        return total, active

    @property
    def weight_bytes(self) -> int:
        """The size of the weights in bfloat16."""
        return 2 * sum(self.total.values())

    @property
    def generation_bytes(self) -> int:
        """The memory to generate with one prompt: weights, and keys and values of CONTEXT tokens, in bfloat16."""
        return self.weight_bytes + CONTEXT * self.cache_bytes

    def as_dict(self) -> dict[str, Any]:
        total, active = self.language_model
        sizes = {"weight_bytes": self.weight_bytes, "generation_bytes": self.generation_bytes, "context": CONTEXT}
        return dataclasses.asdict(self) | {"language_model": {"total": total, "active": active}} | sizes


@dataclass(frozen=True)
class StageCost:
    """`memory`: bytes of weights, gradients and AdamW's two moments in float32 on each device, and of the weights of a live teacher;
    `activations`: bytes of a micro batch, which come on top, if the `batch` is known (`memory.py`). `flops`: of the language model's
    forward and backward pass, and of a live teacher's forward pass, for one token at CONTEXT."""

    memory: int
    flops: int
    activations: int | None = None
    batch: Batch | None = None

    @property
    def peak(self) -> int | None:
        """The largest memory of a training step on each device: all of it, as with gradient accumulation."""
        return None if self.activations is None else self.memory + self.activations


def count(model: PreTrainedModel, context: int = CONTEXT) -> Budget:
    """Return the budget of `model`, which may be on the meta device. `context`: tokens that the counted token attends to."""
    total = dict.fromkeys(PARTS, 0)
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        total[parts[name]] += parameter.numel()
    experts, products = _experts_of(model), products_of(model)
    active = dict(total)
    if experts is not None:
        active["experts"] = round(sum(number for name, number in products.items() if parts[name] == "experts"))
    for name in vision_names(model):
        number = sum(parameter.numel() for parameter in model.get_submodule(f"{name}.experts").parameters())
        assert experts is not None
        active[parts[f"{name}.router.weight"]] -= number - number * experts[1] // experts[0]
    text: Any = model.config.get_text_config()
    layers = decoder_layers(model)
    attention = sum(attention_of(layer) is not None for layer in layers)
    return Budget(
        layers=text.num_hidden_layers,
        moe_layers=moe_layers(model),
        vision=list(vision_names(model).values()),
        experts=experts,
        total=total,
        active=active,
        flops=round(2 * sum(products.values())) + sum(_score_flops(model, layer, context) for layer in layers),
        cache_bytes=2 * attention * (_key_value_heads(text) or text.num_attention_heads) * _head_width(text) * 2,
    )


def _experts_of(model: PreTrainedModel) -> tuple[int, int] | None:
    """Return (experts in a layer, experts that a token uses), or None for a dense model."""
    if isinstance(model, SparseModel):
        return model.config.experts_per_layer, model.config.experts_per_token
    return next(((group.num_experts, group.top_k) for group in native_experts(model)), None)


def products_of(model: PreTrainedModel) -> dict[str, float]:
    """Return with how many numbers of each parameter a text token is multiplied, by name: those of the decoder layers, without norms and
    experts that it does not use, and of the head. Looking a token up in the embedding table costs nothing, but a tied head has its name."""
    parts, head, experts = parts_of(model), model.get_output_embeddings().weight, _experts_of(model)
    used = 1 if experts is None else experts[1] / experts[0]
    groups = native_experts(model)
    first = {group.layer: group.experts for group in reversed(groups)}  # others of a layer are for images
    unseen = tuple(f"{group.experts}." for group in groups if group.experts not in first.values())
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parts[name] == "experts":
            found[name] = 0 if name.startswith(unseen) else parameter.numel() * used
        elif parts[name] in ("attention", "FFN", "router") or parameter is head:
            found[name] = parameter.numel()
    return found


def _head_width(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _key_value_heads(text: Any) -> int | None:
    return getattr(text, "num_key_value_heads", None)


def _score_flops(model: PreTrainedModel, layer: nn.Module, context: int) -> int:
    """Return the FLOPs of products of activations in a token's forward pass through a layer: queries with keys, attention weights with
    values. A layer with a sliding window sees no more than that of the context; one without attention over the context has none."""
    attention, text = attention_of(layer), model.config.get_text_config()
    seen = 0 if attention is None else min(context, getattr(attention, "sliding_window", None) or context)
    return 4 * seen * text.num_attention_heads * _head_width(text)


def survey(target: Recipe | str | Path, vision_towers: str | Path | None = None) -> tuple[Budget, dict[str, StageCost]]:
    """Return (budget, cost of training by stage) of a checkpoint, ours or a published one, or of the last model of a recipe, with its
    sharding.

    Raises CheckpointError as loading a checkpoint does.
    """
    if isinstance(target, Recipe):
        return survey_recipe(target)
    if published_family(read_config(target).get("model_type")):
        model = inspect_published(target, vision_towers, with_weights=False).on_meta()
    else:
        model = load_on_meta(target)
    if is_sparse(model):
        return count(model), {"stage3": stage_cost(model, "stage3", moe_layers(model), vision=list(vision_names(model)))}
    return count(model), {stage: stage_cost(model, stage, []) for stage in ("stage1", "stage2")}


def survey_recipe(recipe: Recipe, context: int = CONTEXT) -> tuple[Budget, dict[str, StageCost]]:
    """Return the same as `survey`, of a recipe."""
    start = load_structure(recipe.model)
    planned = None if is_sparse(start) else sparse_config(start.config, recipe.stage3.options)
    sparse_layers = moe_layers(start) if planned is None else planned.moe_layer_indices
    final = start if recipe.stage3.dense or planned is None else on_meta(planned)
    processes = recipe.sharding.fsdp_size if recipe.sharding else 1
    costs = {}
    for stage in (Stage(recipe, number) for number in recipe.stages):
        if stage.number < 3 and is_sparse(start):
            continue
        model = final if stage.number == 3 else start
        cost = stage_cost(
            model,
            stage.trainable,
            sparse_layers,
            stage.settings.adapter,
            stage.settings.optimisation.gradient_checkpointing,
            context,
            stage_batch(stage, model),
            bf16=stage.bf16,
            eager=recipe.attention == "eager",
            vision=stage.vision_ffns(model),
        )
        memory, flops = cost.memory // processes, cost.flops
        if stage.distillation and stage.distillation.top_k is None:  # a cache is filled, and its teacher gone, before the first step
            teacher = count(load_on_meta(stage.distillation.teacher), context)
            memory, flops = memory + teacher.weight_bytes * (1 if stage.bf16 else 2), flops + teacher.flops  # every process has all of it
        costs[stage.name] = dataclasses.replace(cost, memory=memory, flops=flops)
    return count(final, context), costs


def is_sparse(model: PreTrainedModel) -> bool:
    """Return whether a model has experts, made here or its family's own."""
    return isinstance(model, SparseModel) or is_native(model)


def active_parameters(model: PreTrainedModel) -> int:
    """Return how many parameters one token goes through."""
    return sum(count(model).active.values())


def stage_cost(
    model: PreTrainedModel,
    stage: str,
    moe_layers: list[int],
    adapter: Adapter | None = None,
    checkpointing: bool = False,
    context: int = CONTEXT,
    batch: Batch | None = None,
    bf16: bool = False,
    eager: bool = False,
    vision: Sequence[str] = (),
) -> StageCost:
    """Return the cost of training the whole model, sharded or not; with `batch`, also its activations, in `bf16`, with `eager` attention.

    Args: `model` becomes what the stage trains, in float32, however it is stored; `stage`, `moe_layers` and `vision` as in
    `choose_parameters`; an `adapter` is trained alone, on a base that it may quantise; `checkpointing` repeats the forward pass; `context`
    as in `count`.
    """
    model.float()
    if adapter is None:
        trained, counts, saved = model, choose_parameters(model, stage, moe_layers, vision), 0
    else:
        trained = copy.deepcopy(model)
        if adapter.quantise_experts:
            separate_experts(trained)
        saved = quantisation_saves(trained, adapter.quantisation) if adapter.quantisation else 0
        trained, counts = attach(trained, dataclasses.replace(adapter, continue_from=None), stage, "")
        if bf16:
            cast_frozen(trained, adapter)
            saved += cast_saves(trained, adapter)
    memory = 4 * counts.total + 12 * sum(counts.trained.values()) - saved
    kept = None if batch is None else activations(without_adapter(trained), batch, checkpointing, bf16, eager).peak
    flops = count(model, context).flops + _backward_flops(model, without_adapter(trained), checkpointing, context)
    return StageCost(memory, flops, kept, batch)


def _backward_flops(model: PreTrainedModel, trained: PreTrainedModel, checkpointing: bool, context: int) -> int:
    """Return the FLOPs of a token's backward pass through the language model. `trained`: the same, with parameters chosen, or an adapter.

    The gradient of an activation costs as much as the product that made it, those of the scores twice; below the first trained parameter
    there are none. So if only the FFN of a layer is trained, and nothing below, only the input of its last matrix has one. The gradient
    of a trained weight costs as much as its product. With `checkpointing`, the layers that gradients reach are computed again.
    """
    parts, products, trained_parts = parts_of(model), products_of(model), parts_of(trained)
    trainable = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    prefix = f"{backbone_name(model)}.layers"
    inside = sum(number for name, number in products.items() if name.startswith(f"{prefix}."))
    flops = 2 * (sum(products.values()) - inside)  # the head
    reached = any(trained_parts[name] in ("tower", "projector", "embeddings") for name in trainable)
    for index, layer in enumerate(decoder_layers(model)):
        own = {name: 2 * number for name, number in products.items() if name.startswith(f"{prefix}.{index}.")}
        scores, whole = _score_flops(model, layer, context), sum(own.values())
        begins = {trained_parts[name] for name in trainable if name.startswith(f"{prefix}.{index}.")}
        if reached or begins & {"attention", "norms"}:
            flops += whole + 2 * scores
        elif begins:
            matrices = 2 if layout_of(getattr(layer, "mlp", None))[0] else 3
            flops += sum(number for name, number in own.items() if parts[name] in ("FFN", "experts")) / matrices
        reached = reached or bool(begins)
        flops += checkpointing * reached * (whole + scores)
    used = products_of(trained)
    return round(flops + sum(2 * used.get(name, 0) for name in trainable))


def stage_batch(stage: Stage, model: PreTrainedModel) -> Batch:
    """Return the largest micro batch of a stage: rows of `max_length` tokens, or of CONTEXT if nothing is cut, all with labels; for a tower
    with experts, each with an image."""
    settings = stage.settings
    rows, length = settings.optimisation.per_device_batch_size, settings.max_length or CONTEXT
    options = model.config if isinstance(model, SparseModel) else stage.recipe.stage3.options
    sees = stage.number == 3 and "vision_tower" in options.moe_in
    patches = rows * patches_of_image(model.config.vision_config) if sees else 0
    return Batch(rows, length, rows * length, patches, taught=stage.distillation is not None)


def patches_of_image(vision: Any) -> int:
    """Return how many patches an image of the tower's own size has, by the configuration of the tower; one that takes any size has a table
    of so many positions."""
    if hasattr(vision, "num_position_embeddings"):
        return int(vision.num_position_embeddings)
    sides, patch = ([each] * 2 if isinstance(each, int) else each for each in (vision.image_size, vision.patch_size))
    return (sides[0] // patch[0]) * (sides[1] // patch[1])
