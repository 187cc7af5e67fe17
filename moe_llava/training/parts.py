"""The parts of a vision-language model of any family, by the names of its parameters.

Everything outside the text backbone and the head sees images: the projector is what PROJECTORS names, and the tower is the rest. Their
experts and routers are parts of them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_llava.model import SparseMlp, SparseModel
from moe_llava.model.places import PROJECTORS, find_backbone
from moe_llava.model.upcycling import has_experts
from moe_llava.routing.routers import RoutedExperts, routed_experts

PARTS = ("tower", "projector", "embeddings", "attention", "FFN", "experts", "router", "norms")
_MIXERS = ("self_attn", "linear_attn")  # what families call the attention of a decoder layer


def backbone_name(model: PreTrainedModel) -> str:
    """Return the name of the text backbone, which has the decoder layers."""
    return find_backbone(model)[0]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(find_backbone(model)[1].layers)


def is_native(model: PreTrainedModel) -> bool:
    """Return whether a model has experts of its family's own, which were not made here."""
    return not isinstance(model, SparseModel) and has_experts(decoder_layers(model))


def native_experts(model: PreTrainedModel) -> list[RoutedExperts]:
    """Return the experts of a family's own, with their routers; none for other models."""
    return routed_experts(model) if is_native(model) else []


def moe_layers(model: PreTrainedModel) -> list[int]:
    """Return the indices of the layers with experts; none for a dense model."""
    if isinstance(model, SparseModel):
        return model.config.moe_layer_indices
    return sorted({group.layer for group in native_experts(model)})


def vision_names(model: PreTrainedModel) -> dict[str, str]:
    """Return name -> label of the sparse FFNs outside the language model; none for a model that was not made here."""
    return {name: label for label, name in model.vision_names.items()} if isinstance(model, SparseModel) else {}


def parts_of(model: PreTrainedModel) -> dict[str, str]:
    """Return which of PARTS each parameter belongs to, by its name. `model` may be on the meta device."""
    backbone, head = backbone_name(model), model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    parts = {name: "embeddings" if id(parameter) in heads else _part(model, name, backbone) for name, parameter in model.named_parameters()}
    for group in native_experts(model):
        for module, part in ((group.experts, "experts"), (group.router, "router")):
            parts |= {f"{module}.{name}": part for name, _ in model.get_submodule(module).named_parameters()}
    return parts


def _part(model: PreTrainedModel, name: str, backbone: str) -> str:
    if not name.startswith(f"{backbone}."):
        return "projector" if set(name.split(".")) & set(PROJECTORS) else "tower"
    inside = name.removeprefix(f"{backbone}.").split(".")
    if inside[0] != "layers":
        return "norms" if "norm" in inside[0] else "embeddings"
    if inside[2] == "mlp":
        mlp = model.get_submodule(".".join([backbone, *inside[:3]]))
        if isinstance(mlp, SparseMlp) and inside[3] not in ("shared_experts", "residual_mlp"):
            return "experts" if inside[3] == "experts" else "router"
        return "FFN"
    return "attention" if inside[2] in _MIXERS else "norms"


def projector_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules of the projector."""
    names = [name for name, part in parts_of(model).items() if part == "projector"]
    found: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        end = next(index for index, word in enumerate(words) if word in PROJECTORS)
        found[".".join(words[: end + 1])] = None
    return list(found)


def attention_of(layer: nn.Module) -> Any:
    """Return the module of a decoder layer that computes attention over the context, or None: hybrid models have layers without."""
    return getattr(layer, _MIXERS[0], None)
