"""Sparse models in vLLM's backend for transformers models, with token ids beside the embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM, TransformersMultiModalMoEForCausalLM
from vllm.model_executor.models.transformers.base import Base


class ImageMask:
    """Mixin that tells the routers which tokens belong to images."""

    requires_raw_input_tokens = True  # vLLM then passes token ids with the embeddings

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        vllm_config.model_config.hf_config.engine_passes_image_mask = True
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> Any:
        if self.model_config.uses_mrope:  # type: ignore[attr-defined]
            positions = positions[:, None].contiguous()
        mask = None
        if input_ids is not None:
            mask = self.model.image_tokens(input_ids)  # type: ignore[attr-defined]
            torch._dynamo.mark_dynamic(mask, 0)  # vLLM compiles the model for any number of tokens
        return Base.forward(self, input_ids, positions, intermediate_tensors, inputs_embeds, image_mask=mask)


class SparseModelForVllm(ImageMask, TransformersMultiModalMoEForCausalLM):
    """A sparse model with vLLM's own kernels for its experts, if it knows them."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """Return a model without these kernels if its experts are not gated by SiLU: their number is then not in the saved text config."""
        if vllm_config.model_config.get_num_experts() == 0:
            return OtherSparseModel(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)


class OtherSparseModel(ImageMask, TransformersMultiModalForCausalLM):
    """A sparse model whose experts run as the package computes them."""
