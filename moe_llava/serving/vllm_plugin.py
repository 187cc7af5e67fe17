"""A plugin of vLLM, for models with `routing: modality_split`: their routers need to know which tokens belong to images.

vLLM loads it in every process, through the entry point vllm.general_plugins. It must stay light: the classes are in vllm_model.py.
"""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moe_llava.model.configuration import PREFIX


def register() -> None:
    """Register the sparse class of every family: vLLM finds a class by the name in `architectures`."""
    from vllm import ModelRegistry

    for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        ModelRegistry.register_model(f"{PREFIX}{name}", "moe_llava.serving.vllm_model:SparseModelForVllm")
