"""Which vision-language models of the installed transformers can be upcycled, found by building each on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moe_llava.model.ffn import find_form
from moe_llava.model.modeling import find_backbone

CAN, MOE, CANNOT = "can be upcycled", "already MoE", "cannot"
FEW_LAYERS = 4  # of each kind of layer one is enough, but configurations with a list of kinds keep their number


@dataclass(frozen=True)
class Support:
    """`status`: CAN, MOE (can be traced and trained as it is) or CANNOT. `reason`: the experts that compute its FFN, or what was found."""

    model_type: str
    class_name: str
    status: str
    reason: str


def list_support() -> list[Support]:
    """Return what can be done with each model type that AutoModelForImageTextToText knows, sparse ones of this package left out."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [support_of(kind) for kind in sorted(names) if not kind.startswith("moe_")]


def support_of(model_type: str) -> Support:
    """Build a model of this type without weights and look at its decoder layers."""
    class_name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    class_name = class_name if isinstance(class_name, str) else class_name[0]
    try:
        layers = _decoder_layers(model_type, class_name)
    except ValueError as error:
        return Support(model_type, class_name, CANNOT, str(error))
    if any(name.rpartition(".")[2] == "experts" for layer in layers for name, _ in layer.named_modules()):
        return Support(model_type, class_name, MOE, "its layers have experts")
    forms, problems = set(), set()
    for layer in layers:
        try:
            forms.add(find_form(layer).experts.__name__)
        except ValueError as error:
            problems.add(str(error))
    if forms:
        return Support(model_type, class_name, CAN, ", ".join(sorted(forms)))
    return Support(model_type, class_name, CANNOT, sorted(problems)[0])


def _decoder_layers(model_type: str, class_name: str) -> list[nn.Module]:
    """Return the decoder layers of a small model of this type; if its default configuration builds no whole model, of its backbone.

    Raise ValueError if neither has any.
    """
    with torch.device("meta"):
        try:
            model = getattr(transformers, class_name)(_small(AutoConfig.for_model(model_type)))
        except Exception as whole:  # defaults of configurations fail in many ways, and the reason is reported
            try:
                model: Any = AutoModel.from_config(_small(AutoConfig.for_model(model_type)).get_text_config())
            except Exception:
                raise ValueError(f"its default configuration builds no model: {type(whole).__name__}: {whole}") from whole
    return list(find_backbone(model)[1].layers)


def _small(config: Any) -> Any:
    for part in (config.get_text_config(), getattr(config, "vision_config", None)):
        if getattr(part, "num_hidden_layers", None) and not getattr(part, "layer_types", None):
            part.num_hidden_layers = FEW_LAYERS
    return config
