"""Find the FFNs that may become sparse: in the language model, and by the names that families give to their parts, outside.

Decoder layers and a tower's encoder layers have their FFN in `mlp`; a projector is an FFN itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .configuration import SparseConfig
from .options import MoeOptions

# What families call the modules between tower and language model.
PROJECTORS = (
    "multi_modal_projector",
    "connector",
    "merger",
    "deepstack_merger_list",
    "embed_vision",
    "visual_embeddings_table",
    "resampler_model",
)


def find_backbone(model: PreTrainedModel) -> tuple[str, Any]:
    """Return (name, module) of the text backbone, which has the decoder layers. Raise ValueError if there is none."""
    decoder = model.get_decoder()
    for module in (decoder, getattr(decoder, "model", None)):
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return next((name, found) for name, found in model.named_modules() if found is module)
    raise ValueError(f"{type(model).__name__} has no decoder layers that could become sparse")


def ffn_names(model: PreTrainedModel, options: SparseConfig) -> dict[int | str, str]:
    """Return the names of the FFNs of a dense model that become sparse: by layer index in the language model, by label outside."""
    backbone = find_backbone(model)[0]
    return {index: f"{backbone}.layers.{index}.mlp" for index in options.moe_layer_indices} | vision_ffns(model, options)


def vision_ffns(model: PreTrainedModel, options: MoeOptions) -> dict[str, str]:
    """Return label -> name of the FFN, for each outside the language model that `options.moe_in` makes sparse, or has made sparse.

    Labels are "tower 0" for the tower's first layer, and so on, and "projector". Raise ValueError if the model has no such part, or one of
    another structure."""
    found = {}
    if "vision_tower" in options.moe_in:
        name, layers = tower_layers(model)
        for index in options.sparse_layers(len(layers), "vision tower"):
            if not hasattr(layers[index], "mlp"):
                modules = ", ".join(child for child, _ in layers[index].named_children())
                raise ValueError(
                    f"moe_in has vision_tower, but {type(layers[index]).__name__} has no module 'mlp' that experts could replace; its "
                    f"modules are: {modules}"
                )
            found[f"tower {index}"] = f"{name}.{index}.mlp"
    if "projector" in options.moe_in:
        names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PROJECTORS]
        if len(names) != 1:
            raise ValueError(f"moe_in has projector, but {type(model).__name__} has {len(names)} that are known: {', '.join(names)}")
        found["projector"] = names[0]
    return found


def tower_layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Return (name, encoder layers) of the vision tower: of the longest list of modules in it, those that contribute to the features.
    Layers after `vision_feature_layer`, the index of a hidden state or of several, would get no gradient."""
    tower: Any = model.get_encoder(modality="image")
    lists = [] if tower in (model, model.base_model) else [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ValueError(f"moe_in has vision_tower, but {type(model).__name__} has none whose layers are known")
    layers = max(lists, key=len)
    chosen = getattr(model.config, "vision_feature_layer", -1)
    used = max(index % (len(layers) + 1) for index in ([chosen] if isinstance(chosen, int) else chosen))
    return next(name for name, module in model.named_modules() if module is layers), list(layers)[:used]
