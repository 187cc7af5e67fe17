"""The sparse language model: a family's own backbone with experts in some layers.

Unusual here:
- The class is made on the fly: a subclass of the family's backbone that swaps `layer.mlp` for a SparseMlp in its constructor and tells
  transformers how to record the router. Nothing is patched, and no family is named.
- Such a class cannot be imported, so an instance is pickled by its family's class.
- Engines and trainers read the text config, so what they need is written there: here, and in `MoeLlavaConfig.add_training_fields`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

from .configuration import MoeLlavaConfig
from .ffn import sparse_mlp
from .moe import Experts, GatedExperts, Router, activation_name, init_sparse_weights
from .smoes import ModalityStatistics

SONICMOE = ("silu", "gelu", "relu")  # the activations of its kernel


class ExpertsSupport(PreTrainedModel):
    """Mixed into every class that has experts below it: `experts_implementation`, and pickling."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for the decorator in the module of the class; the experts are in moe.py

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the backend of the experts; None means "auto".

        Raises ValueError if it is unknown, or if it cannot compute the experts' activation.
        """
        if requested_experts == "sonicmoe":
            for experts in self.modules():
                if isinstance(experts, Experts):
                    _check_sonicmoe(experts)
        return super().get_correct_experts_implementation("auto" if requested_experts is None else requested_experts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled model. transformers registers what a class can record in its constructor, which does not run here."""
        super().__setstate__(state)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)


def _check_sonicmoe(experts: Experts) -> None:
    """Raise ValueError if the kernel would compute another activation: it takes one that it does not find for SiLU."""
    name = activation_name(experts.act_fn)
    if not isinstance(experts, GatedExperts) or name not in SONICMOE:
        raise ValueError(
            f"experts_implementation 'sonicmoe' computes gated experts with {', '.join(SONICMOE)}, but these are {type(experts).__name__} "
            f"with {name}"
        )


class SparseBackbone(ExpertsSupport):
    """Mixed into a family's backbone by `sparse_backbone_class`."""

    dense_class: type[PreTrainedModel]

    def __init__(self, config: Any, moe_config: MoeLlavaConfig):
        super().__init__(config)
        for index in moe_config.moe_layer_indices:
            self.layers[index].mlp = sparse_mlp(moe_config, self.layers[index])
        if moe_config.routing == "smoes":
            self._keep_in_fp32_modules_strict.add("statistics")  # when they are loaded; transformers has made it a set
        self.post_init()
        # How transformers gives each process whole experts, and sends it their tokens: DistributedConfig(ep_size=...).
        experts = self.layers[moe_config.moe_layer_indices[0]].mlp.experts
        self._ep_plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name, _ in experts.named_parameters()}
        self._ep_plan["layers.*.mlp.experts"] = "ep_dispatch_experts"
        # Kernels look for the activation of experts in the configuration that the experts hold.
        moe_config.hidden_act = activation_name(experts.act_fn)
        # By these fields, saved with the model, an engine with kernels of its own knows that it has experts: vLLM does, and takes them
        # to be gated by SiLU. It runs others as they are written here, if it is not told.
        if isinstance(experts, GatedExperts) and moe_config.hidden_act == "silu":
            config.num_experts = moe_config.num_experts
            config.num_experts_per_tok = moe_config.num_experts_per_tok
            config.norm_topk_prob = moe_config.norm_topk_prob
            config.moe_intermediate_size = experts.intermediate_dim

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank_backbone, (self.dense_class,), *state)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_sparse_weights(module, self.config.initializer_range)
        if isinstance(module, ModalityStatistics):
            module.reset()


@cache
def sparse_backbone_class(dense_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the sparse subclass of a backbone such as LlamaModel."""
    recorders = {
        **(dense_class._can_record_outputs or {}),
        "router_logits": OutputRecorder(Router, index=0),
        "router_drops": OutputRecorder(Router, index=3),
        "modality_scores": OutputRecorder(ModalityStatistics, index=0),
        "modality_sums": OutputRecorder(ModalityStatistics, index=1),
    }
    namespace = {
        "dense_class": dense_class,
        "_can_record_outputs": recorders,
        # The family's module, not this one, so that transformers finds the family's attention code where it looks for it.
        "__module__": dense_class.__module__,
    }
    return type(f"Sparse{dense_class.__name__}", (SparseBackbone, dense_class), namespace)


def _blank_backbone(dense_class: Any) -> PreTrainedModel:
    """Return an instance without a state, for unpickling."""
    return object.__new__(sparse_backbone_class(dense_class))
