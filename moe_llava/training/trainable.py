"""Select the parameters that are trained in each stage. Defined here, and nowhere else.

| stage | trained |
|---|---|
| I | the projector |
| II | the projector and the whole language model |
| III | experts, also shared ones, and routers, also those of a MoE family (with `use_residual` the mixing coefficients, but no dense FFN) |
| III, dense baseline | the FFNs that would have become sparse |
| III, either, with `tuned: all` | what is trained in stage II, and what stage III trains in the tower |

With `moe_in`, stage III trains experts, routers or FFNs outside the language model, too; they are counted apart, as "vision experts" etc.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_llava.model import SparseModel
from moe_llava.model.places import PROJECTORS, find_backbone
from moe_llava.training.parts import decoder_layers, is_native, native_experts, projector_modules

TRAINABLE = {
    "stage1": ("projector",),
    "stage2": ("projector", "language model"),
    "stage3": ("experts", "routers"),
    "dense": ("FFN",),
}
VISION = "vision "  # begins the names of the parts outside the language model


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one stage: the trained ones by part, and how many there are in total."""

    trained: dict[str, int]
    total: int

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {count:,}" for part, count in self.trained.items())
        trained = sum(self.trained.values())
        return f"trains {parts}: {trained:,} of {self.total:,} parameters ({trained / self.total:.1%})"


def choose_parameters(model: PreTrainedModel, stage: str, moe_layers: Sequence[int], vision: Sequence[str] = ()) -> ParameterCount:
    """Set `requires_grad` of every parameter for `stage`, a key of TRAINABLE. `moe_layers` are the layers that are or would be sparse,
    `vision` the names of the FFNs outside the language model that are or would be.

    Parameters that a family with experts of its own keeps frozen stay so, such as a bias that only decides which experts are chosen.
    """
    fixed = _fixed(model) if is_native(model) else set()
    model.requires_grad_(False)
    inside = TRAINABLE[stage] if moe_layers or stage in ("stage1", "stage2") else ()
    outside = (("experts", "routers") if isinstance(model, SparseModel) else ("FFN",)) if vision else ()
    counts = dict.fromkeys([*inside, *(VISION + part for part in outside)], 0)
    for part in counts:
        for parameter in _parameters_of(model, part, moe_layers, vision):
            if id(parameter) not in fixed and not parameter.requires_grad:
                counts[part] += parameter.numel()
                parameter.requires_grad_(True)
    return ParameterCount(counts, sum(parameter.numel() for parameter in model.parameters()))


def _fixed(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters that a family keeps frozen. Loaded ones no longer show it, so the model is built anew."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    return {id(model.get_parameter(name)) for name, parameter in fresh.named_parameters() if not parameter.requires_grad}


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on for the layers whose activations a backward pass needs.

    For reentrant checkpointing, transformers makes the outputs of the embeddings and of the tower require a gradient. Then the frozen tower
    and all layers below the first trainable one would be recomputed and differentiated for nothing.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def _parameters_of(model: PreTrainedModel, part: str, moe_layers: Sequence[int], vision: Sequence[str]) -> list[nn.Parameter]:
    """Raise ValueError if no module of the model is known as its projector."""
    if part == "language model":
        return list(find_backbone(model)[1].parameters()) + list(model.get_output_embeddings().parameters())
    if part == "projector":
        names = projector_modules(model)
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no projector that is known, so stages I and II cannot train it: it must be called one of "
                f"{', '.join(PROJECTORS)}"
            )
        return [parameter for name in names for parameter in model.get_submodule(name).parameters()]
    if native := native_experts(model):
        names = [group.experts if part == "experts" else group.router for group in native]
        return [parameter for name in names for parameter in model.get_submodule(name).parameters()]
    layers = decoder_layers(model)
    mlps: list[Any] = [layers[index].mlp for index in moe_layers]
    if part.startswith(VISION):
        mlps = [model.get_submodule(name) for name in vision]
    match part.removeprefix(VISION):
        case "experts":
            modules = [mlp.experts for mlp in mlps] + [mlp.shared_experts for mlp in mlps if mlp.shared_experts is not None]
        case "routers":
            modules = [mlp.router for mlp in mlps] + [mlp.coefficient for mlp in mlps if mlp.coefficient is not None]
        case "FFN":
            modules = mlps
        case _:
            raise ValueError(f"no part of the model is called {part!r}")
    return [parameter for module in modules for parameter in module.parameters()]
