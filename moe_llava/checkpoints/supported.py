"""Which vision-language models of the installed transformers can be upcycled, found by building each on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moe_llava.common.progress import with_bar
from moe_llava.model.ffn import find_form
from moe_llava.model.modeling import find_backbone
from moe_llava.model.upcycling import has_experts, has_vision

CAN, MOE, CANNOT = "can be upcycled", "already MoE", "cannot be upcycled"
FEW_LAYERS = 4  # of each kind of layer one is enough, but configurations with a list of kinds keep their number


@dataclass(frozen=True)
class Support:
    """`status`: CAN, MOE (can be traced, evaluated and served as it is) or CANNOT. `reason`: the experts that compute its FFN, or what was
    found."""

    model_type: str
    class_name: str
    status: str
    reason: str


def model_types() -> list[str]:
    """Return the model types that AutoModelForImageTextToText knows, sparse ones of this package left out."""
    return sorted(kind for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if not kind.startswith("moe_"))


def list_support() -> list[Support]:
    """Return what can be done with each of `model_types`."""
    return [support_of(kind) for kind in with_bar(model_types(), "building models without weights")]


def support_of(model_type: str) -> Support:
    """Build a model of this type without weights and look at its decoder layers."""
    class_name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    class_name = class_name if isinstance(class_name, str) else class_name[0]
    if not has_vision(AutoConfig.for_model(model_type)):
        return Support(model_type, class_name, CANNOT, "its configuration has no vision_config")
    try:
        layers = _decoder_layers(model_type, class_name)
    except ValueError as error:
        return Support(model_type, class_name, CANNOT, str(error))
    if has_experts(layers):
        return Support(model_type, class_name, MOE, "its layers have experts")
    forms, problems = set(), set()
    for layer in layers:
        try:
            forms.add(find_form(layer).experts.__name__)
        except ValueError as error:
            problems.add(str(error).partition(". ")[0])
    if forms:
        return Support(model_type, class_name, CAN, ", ".join(sorted(forms)))
    return Support(model_type, class_name, CANNOT, sorted(problems)[0])


def _decoder_layers(model_type: str, class_name: str) -> list[nn.Module]:
    """Return the decoder layers of a small model of this type; if its default configuration builds no whole model, of its backbone.

    Raise ValueError if neither has any.
    """
    failures: list[Exception] = []
    for build in (_whole, _backbone):
        try:
            with torch.device("meta"):
                return list(find_backbone(build(model_type, class_name))[1].layers)
        except ValueError as error:
            if "decoder layers" in str(error):
                raise
            failures.append(error)
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:  # configurations' defaults fail in many ways
            failures.append(error)
    raise ValueError(f"its default configuration builds no model: {type(failures[0]).__name__}: {failures[0]}")


def _whole(model_type: str, class_name: str) -> Any:
    return getattr(transformers, class_name)(_small(AutoConfig.for_model(model_type)))


def _backbone(model_type: str, class_name: str) -> Any:
    return AutoModel.from_config(_small(AutoConfig.for_model(model_type)).get_text_config())


def _small(config: Any) -> Any:
    parts: list[Any] = [config.get_text_config(), getattr(config, "vision_config", None)]
    for part in parts:
        if getattr(part, "num_hidden_layers", None) and not getattr(part, "layer_types", None):
            part.num_hidden_layers = FEW_LAYERS
    return config


def summary(rows: Sequence[Support]) -> str:
    """Return how many types have each status, and the version of transformers."""
    counts = ", ".join(f"{sum(row.status == status for row in rows)} {status}" for status in (CAN, MOE, CANNOT))
    return f"{len(rows)} model types of transformers {transformers.__version__}: {counts}"
