"""The public names of the network. Importing this file registers configuration, model and processor with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .configuration import MoeLlavaConfig
from .losses import balance_loss, z_loss
from .modeling import MoeLlavaForConditionalGeneration, MoeLlavaModel
from .moe import Experts, Router, SparseMlp
from .options import MoeOptions
from .processing import MoeLlavaProcessor
from .upcycling import evolve_experts, upcycle

# The names of configuration and processor may stand in the tables already: see moe_llava/_registration.py.
AutoConfig.register(MoeLlavaConfig.model_type, MoeLlavaConfig, exist_ok=True)
AutoModel.register(MoeLlavaConfig, MoeLlavaModel)
AutoModelForImageTextToText.register(MoeLlavaConfig, MoeLlavaForConditionalGeneration)
AutoProcessor.register(MoeLlavaConfig, MoeLlavaProcessor, exist_ok=True)
# pipeline("image-text-to-text") looks the model up by name.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[MoeLlavaConfig.model_type] = MoeLlavaForConditionalGeneration.__name__

# What is saved takes these files with it, and names them in `auto_map`.
MoeLlavaConfig.register_for_auto_class("AutoConfig")
MoeLlavaModel.register_for_auto_class("AutoModel")
MoeLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
MoeLlavaProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "Experts",
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeLlavaProcessor",
    "MoeOptions",
    "Router",
    "SparseMlp",
    "balance_loss",
    "evolve_experts",
    "upcycle",
    "z_loss",
]
