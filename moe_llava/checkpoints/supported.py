"""List the vision-language models of the installed transformers that can be upcycled, by building each on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moe_llava.common.messages import first_line
from moe_llava.common.progress import with_bar
from moe_llava.model.ffn import find_form
from moe_llava.model.options import MoeOptions
from moe_llava.model.places import find_backbone
from moe_llava.model.upcycling import check_kind, copy_into_experts, has_experts

CAN, MOE, CANNOT, UNKNOWN = "can be upcycled", "already MoE", "cannot be upcycled", "unknown"
NARROW = 16  # the least width of the FFNs that are compared with experts


@dataclass(frozen=True)
class Support:
    """`status`: whether `upcycle` takes a model of this type: CAN, MOE or CANNOT; UNKNOWN if its default configuration builds no model.
    `reason`: the experts that compute its FFN, or what was found."""

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
    """Build a model of this type without weights, and check it as `upcycle` does with its default options."""
    class_name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    class_name = class_name if isinstance(class_name, str) else class_name[0]
    config = AutoConfig.for_model(model_type)
    try:
        check_kind(getattr(transformers, class_name), config)
        layers = find_backbone(_structure(class_name, config))[1].layers
        if has_experts(layers):
            return Support(model_type, class_name, MOE, "its layers have experts")
        chosen = [layers[index] for index in MoeOptions().sparse_layers(len(layers))]
        return Support(model_type, class_name, CAN, ", ".join(sorted({_experts_of(layer) for layer in chosen})))
    except _NoDefaultError as error:
        return Support(model_type, class_name, UNKNOWN, str(error))
    except ValueError as error:
        return Support(model_type, class_name, CANNOT, str(error).partition(". ")[0])


class _NoDefaultError(Exception):
    """The default configuration of a type builds no model."""


def _structure(class_name: str, config: Any) -> Any:
    """Return a model without weights, or its text backbone if the default configuration of its tower is of no use."""
    failures = []
    for build in (lambda: getattr(transformers, class_name)(config), lambda: AutoModel.from_config(config.get_text_config())):
        try:
            with torch.device("meta"):
                return build()
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:  # defaults fail in many ways
            failures.append(error)
    raise _NoDefaultError(f"its default configuration builds no model: {type(failures[0]).__name__}: {first_line(failures[0])}")


def _experts_of(layer: Any) -> str:
    """Return the name of the experts that compute what the FFN of a layer on the meta device does. Raise ValueError as `upcycle` does.

    They are compared at a fraction of the widths, with random weights.
    """
    form = find_form(layer)
    ffn: Any = copy.deepcopy(layer.mlp)
    width, ffn_width = ffn.get_parameter(form.stacked["down_proj"][0]).shape
    unit = next(n for n in range(max(width // NARROW, 1), 0, -1) if width % n == 0 and ffn_width % n == 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(ffn.named_parameters()):
        module, _, last = name.rpartition(".")
        weights = torch.randn([size // unit for size in parameter.shape], generator=generator)
        setattr(ffn.get_submodule(module), last, nn.Parameter(weights, requires_grad=False))
    options: Any = MoeOptions(num_experts=1, num_experts_per_tok=1)
    experts = form.experts(options, width // unit, ffn_width // unit, getattr(ffn, form.activation))
    try:
        copy_into_experts([ffn], experts)
    except ValueError as error:  # it names numbers, of random weights
        raise ValueError(f"{type(ffn).__name__} has the parameters of {form.experts.__name__}, but computes something else") from error
    return form.experts.__name__


def summary(rows: Sequence[Support]) -> str:
    """Return how many types have each status, and the version of transformers."""
    counts = ", ".join(f"{sum(row.status == status for row in rows)} {status}" for status in (CAN, MOE, CANNOT, UNKNOWN))
    return f"{len(rows)} model types of transformers {transformers.__version__}: {counts}"
