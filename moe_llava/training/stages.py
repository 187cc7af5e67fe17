"""Which parameters learn in which stage. Said here, and nowhere else.

| stage | learns |
|---|---|
| I | the projector |
| II | the projector and the whole language model |
| III | the experts and their routers (with `use_residual` also the mixing coefficients, not the dense FFN beside them) |
| III, dense control | the FFNs of the layers that would have become sparse |
| III, either, with `tuned: all` | what learns in stage II, with the experts and routers that are there |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration

STAGES = {
    "stage1": ("projector",),
    "stage2": ("projector", "language model"),
    "stage3": ("experts", "routers"),
    "dense": ("FFN",),
}


@dataclass(frozen=True)
class ParameterCount:
    """Of one stage: parameters that learn, by part, and all there are."""

    learning: dict[str, int]
    total: int

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {count:,}" for part, count in self.learning.items())
        learning = sum(self.learning.values())
        return f"learns {parts}: {learning:,} of {self.total:,} parameters ({learning / self.total:.1%})"


def choose_parameters(model: LlavaForConditionalGeneration, stage: str, moe_layers: list[int]) -> ParameterCount:
    """Sets `requires_grad` of every parameter for `stage`, a key of STAGES. `moe_layers` are the layers that are or would be sparse."""
    counts = dict.fromkeys(STAGES[stage], 0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in STAGES[stage]:
        for parameter in _parameters_of(model, part, moe_layers):
            if not parameter.requires_grad:
                counts[part] += parameter.numel()
            parameter.requires_grad_(True)
    return ParameterCount(counts, sum(parameter.numel() for parameter in model.parameters()))


def checkpoint_layers(model: LlavaForConditionalGeneration) -> None:
    """Turns gradient checkpointing on, for the layers whose activations a backward pass needs.

    transformers makes what comes out of the embeddings, the tower's too, require a gradient, for the sake of reentrant checkpointing. Then
    the frozen tower, and all layers below the first that learns, would be computed again and gone through backward, for nothing.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def _parameters_of(model: LlavaForConditionalGeneration, part: str, moe_layers: list[int]) -> list[nn.Parameter]:
    layers: Any = model.model.language_model.layers
    match part:
        case "projector":
            modules: list[nn.Module] = [model.model.multi_modal_projector]
        case "language model":
            modules = [model.model.language_model, model.lm_head]
        case "experts":
            modules = [layers[index].mlp.experts for index in moe_layers]
        case "routers":
            mlps = [layers[index].mlp for index in moe_layers]
            modules = [mlp.router for mlp in mlps] + [mlp.coefficient for mlp in mlps if mlp.coefficient is not None]
        case "FFN":
            modules = [layers[index].mlp for index in moe_layers]
        case _:
            raise ValueError(f"no part of the model is called {part!r}")
    return [parameter for module in modules for parameter in module.parameters()]
