"""Sparse classes as transformers' Auto classes know them. This file stays with the package: saved checkpoints do not carry it along."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .configuration import SparseConfig
from .losses import balance_loss, z_loss
from .modeling import SparseModel, sparse_class
from .moe import Experts, Router, SparseMlp
from .options import MoeOptions
from .processing import MoeLlavaProcessor
from .upcycling import evolve_experts, upcycle


def register(dense: Any) -> dict[str, Any]:
    """Make the sparse subclass of a dense class with a head known to the Auto classes, under the model type moe_<type of the family>.

    Return the sparse classes of the family by name.
    """
    model = sparse_class(dense)
    config = model.config_class
    base = sparse_class(MODEL_MAPPING[dense.config_class])
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)
    # pipeline("image-text-to-text") looks the model up by name.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type] = model.__name__
    return {found.__name__: found for found in (config, base, model)}


def classes_of(model_type: str) -> dict[str, Any]:
    """Return the sparse classes of a model type of transformers by name. Raise ImportError if it is no vision-language model."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ImportError(f"transformers has no vision-language model of type {model_type}")
    processors = {"MoeLlavaProcessor": MoeLlavaProcessor} if model_type == "llava" else {}
    return register(getattr(transformers, name)) | processors


MoeLlavaConfig, MoeLlavaModel, MoeLlavaForConditionalGeneration = register(transformers.LlavaForConditionalGeneration).values()
AutoProcessor.register(MoeLlavaConfig, MoeLlavaProcessor, exist_ok=True)
MoeLlavaProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "Experts",
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeLlavaProcessor",
    "MoeOptions",
    "Router",
    "SparseConfig",
    "SparseMlp",
    "SparseModel",
    "balance_loss",
    "evolve_experts",
    "upcycle",
    "z_loss",
]
