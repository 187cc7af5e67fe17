"""The network. Imports nothing else of the package, so that a saved checkpoint can carry it along.

Importing this registers configuration, model and processor with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moe_llava.model.configuration import MoeLlavaConfig
from moe_llava.model.modeling import MoeLlavaForConditionalGeneration, MoeLlavaModel
from moe_llava.model.moe import Experts, Router, SparseMlp, balance_loss, z_loss
from moe_llava.model.processing import MoeLlavaProcessor
from moe_llava.model.upcycling import upcycle

# The names of configuration and processor may stand in the tables already: see moe_llava/_registration.py.
AutoConfig.register(MoeLlavaConfig.model_type, MoeLlavaConfig, exist_ok=True)
AutoModel.register(MoeLlavaConfig, MoeLlavaModel)
AutoModelForImageTextToText.register(MoeLlavaConfig, MoeLlavaForConditionalGeneration)
AutoProcessor.register(MoeLlavaConfig, MoeLlavaProcessor, exist_ok=True)
# pipeline("image-text-to-text") looks the model up by name.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[MoeLlavaConfig.model_type] = MoeLlavaForConditionalGeneration.__name__

__all__ = [
    "Experts",
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeLlavaProcessor",
    "Router",
    "SparseMlp",
    "balance_loss",
    "upcycle",
    "z_loss",
]
