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

from transformers import PreTrainedModel

from moe_llava.checkpoints.families import published_family
from moe_llava.checkpoints.files import read_config
from moe_llava.checkpoints.load import load_on_meta
from moe_llava.checkpoints.published import inspect_published
from moe_llava.checkpoints.separate import separate_experts
from moe_llava.model import SparseModel
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.adapters import attach, quantisation_saves, without_adapter
from moe_llava.training.memory import Batch, activations
from moe_llava.training.parts import PARTS, attention_layers, is_native, moe_layers, native_experts, parts_of, vision_names
from moe_llava.training.recipe import Adapter, Recipe
from moe_llava.training.stage import Stage, load_structure, on_meta
from moe_llava.training.trainable import VISION, choose_parameters

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
    """`memory`: bytes of weights, gradients and AdamW's two moments in float32 on each device; `activations`: bytes of a micro batch, which
    come on top, if the `batch` is known (`memory.py`). `flops`: of the language model's forward and backward pass, for one token at
    CONTEXT."""

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
    experts = _experts_of(model)
    active = dict(total)
    if experts is not None:
        active["experts"] = _seen_experts(model, total["experts"]) * experts[1] // experts[0]
    for name in vision_names(model):
        number = sum(parameter.numel() for parameter in model.get_submodule(f"{name}.experts").parameters())
        assert experts is not None
        active[parts[f"{name}.router.weight"]] -= number - number * experts[1] // experts[0]
    text: Any = model.config.get_text_config()
    # Looking a token up in the embedding table costs nothing; the head multiplies, and a tied one is counted with the table.
    head = model.get_output_embeddings().weight.numel()
    multiplied = active["attention"] + active["FFN"] + active["experts"] + active["router"] + head
    return Budget(
        layers=text.num_hidden_layers,
        moe_layers=moe_layers(model),
        vision=list(vision_names(model).values()),
        experts=experts,
        total=total,
        active=active,
        flops=2 * multiplied + _score_flops(model, context),
        cache_bytes=2 * len(list(attention_layers(model))) * (_key_value_heads(text) or text.num_attention_heads) * _head_width(text) * 2,
    )


def _experts_of(model: PreTrainedModel) -> tuple[int, int] | None:
    """Return (experts in a layer, experts that a token uses), or None for a dense model."""
    if isinstance(model, SparseModel):
        return model.config.experts_per_layer, model.config.experts_per_token
    return next(((group.num_experts, group.top_k) for group in native_experts(model)), None)


def _seen_experts(model: PreTrainedModel, total: int) -> int:
    """Return how many of the `total` parameters of experts a text token may be routed to: of a layer with several routers, the first's."""
    seen = {group.layer: group.experts for group in reversed(native_experts(model))}
    return sum(parameter.numel() for name in seen.values() for parameter in model.get_submodule(name).parameters()) if seen else total


def _head_width(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _key_value_heads(text: Any) -> int | None:
    return getattr(text, "num_key_value_heads", None)


def _score_flops(model: PreTrainedModel, context: int) -> int:
    """Return the FLOPs of products of activations in a token's forward pass: queries with keys, attention weights with values. A layer with
    a sliding window sees no more than that of the context; layers without attention over the context are left out."""
    text: Any = model.config.get_text_config()
    seen = sum(min(context, getattr(layer, "sliding_window", None) or context) for layer in attention_layers(model))
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
        cost = stage_cost(
            final if stage.number == 3 else start,
            stage.trainable,
            sparse_layers,
            stage.settings.adapter,
            stage.settings.optimisation.gradient_checkpointing,
            context,
            stage_batch(stage),
            bf16=stage.bf16,
            eager=recipe.attention == "eager",
            vision=stage.vision_ffns(final if stage.number == 3 else start),
        )
        costs[stage.name] = dataclasses.replace(cost, memory=cost.memory // processes)
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

    Args: `stage`, `moe_layers` and `vision` as in `choose_parameters`; an `adapter` is trained alone, on a base that it may quantise;
    `checkpointing` repeats the forward pass; `context` as in `count`.
    """
    if adapter is None:
        trained, counts, saved = model, choose_parameters(model, stage, moe_layers, vision), 0
    else:
        trained = copy.deepcopy(model)
        if adapter.quantise_experts:
            separate_experts(trained)
        saved = quantisation_saves(trained, adapter.quantisation) if adapter.quantisation else 0
        trained, counts = attach(trained, dataclasses.replace(adapter, continue_from=None), stage, "")
    memory = 4 * counts.total + 12 * sum(counts.trained.values()) - saved
    forward, scores = count(model, context).flops, _score_flops(model, context)
    # In the backward pass, gradients of activations cost as much as the forward pass, those of the scores twice; then those of the weights.
    weights = sum(2 * _multiplied(model, part, number) for part, number in counts.trained.items())
    kept = None if batch is None else activations(without_adapter(trained), batch, checkpointing, bf16, eager).peak
    return StageCost(memory, (1 + checkpointing) * forward + forward + scores + round(weights), kept, batch)


def stage_batch(stage: Stage) -> Batch:
    """Return the largest micro batch of a stage: rows of `max_length` tokens, or of CONTEXT if nothing is cut, all with labels."""
    settings = stage.settings
    rows, length = settings.optimisation.per_device_batch_size, settings.max_length or CONTEXT
    return Batch(rows, length, rows * length)


def _multiplied(model: PreTrainedModel, part: str, number: int) -> float:
    """Return how many of the `number` trainable parameters of a part a text token is multiplied with."""
    if part == "projector" or part.startswith(VISION):
        return 0
    if part == "language model":
        return count(model, context=0).flops / 2
    if part in ("experts", "experts adapter"):
        experts = _experts_of(model)
        assert experts is not None
        return _seen_experts(model, number) * experts[1] / experts[0]
    return number
