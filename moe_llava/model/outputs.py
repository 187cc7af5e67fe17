"""The outputs of a sparse model: those of its family, and the fields of sparse models."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers.utils.generic import ModelOutput

from .configuration import PREFIX

LOSSES = ("language_loss", "aux_loss", "z_loss", "mi_loss")
ROUTED = ("router_logits", "router_choices", "router_drops")
VISION = "vision_"  # begins the names of what routers outside the language model return
OUTPUTS = ("loss", "logits", *LOSSES, *ROUTED, *(VISION + name for name in ROUTED), "modality_scores")
SPARSE_OUTPUTS: dict[type[ModelOutput], type[ModelOutput]] = {}  # a family's outputs -> the same with the fields of sparse models


def extended(outputs: ModelOutput, added: dict[str, Any]) -> ModelOutput:
    """Return the outputs of a forward pass with the fields of sparse models."""
    if type(outputs) not in SPARSE_OUTPUTS:
        add_sparse_outputs(type(outputs))
    return SPARSE_OUTPUTS[type(outputs)](**{**outputs, **{name: value for name, value in added.items() if name in OUTPUTS}})


def add_sparse_outputs(dense: type[ModelOutput]) -> None:
    """Define a subclass of a family's outputs that has the fields of sparse models, None unless requested."""
    added = {name: None for name in OUTPUTS if name not in {f.name for f in fields(dense)} | {"loss", "logits"}}
    namespace = {"__module__": __name__, "__annotations__": dict.fromkeys(added, Any), **added}
    SPARSE_OUTPUTS[dense] = dataclass(type(PREFIX + dense.__name__, (dense,), namespace))
