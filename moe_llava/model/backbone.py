"""The sparse language model: a family's own backbone with experts in some layers.

Unusual here:
- The class is created at run time: a subclass of the family's backbone that replaces `layer.mlp` by a SparseMlp in its constructor and
  declares the router outputs that transformers records. Nothing is patched, and no family is named.
- Such a class cannot be imported, so an instance is pickled by its family's class.
- Serving engines and trainers read the text config, so the fields they need are written there: here, and in
  `MoeLlavaConfig.add_training_fields`.
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

SONICMOE = ("silu", "gelu", "relu")  # activations that its kernel computes


class ExpertsSupport(PreTrainedModel):
    """Mixin of every class that contains experts: `experts_implementation`, and pickling."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for the decorator in the module of the class; the experts are in moe.py

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the backend of the experts; None means "auto". Raise ValueError if it is unknown or cannot compute their activation."""
        if requested_experts == "sonicmoe":
            for experts in self.modules():
                if isinstance(experts, Experts):
                    _check_sonicmoe(experts)
        return super().get_correct_experts_implementation("auto" if requested_experts is None else requested_experts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled model. transformers registers recordable outputs in the constructor, which does not run here."""
        super().__setstate__(state)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)


def _check_sonicmoe(experts: Experts) -> None:
    """Raise ValueError if the kernel would compute another activation: it replaces one that it does not know by SiLU."""
    name = activation_name(experts.act_fn)
    if not isinstance(experts, GatedExperts) or name not in SONICMOE:
        raise ValueError(
            f"experts_implementation 'sonicmoe' computes gated experts with {', '.join(SONICMOE)}, but these are {type(experts).__name__} "
            f"with {name}"
        )


class SparseBackbone(ExpertsSupport):
    """Mixin that `sparse_backbone_class` adds to a family's backbone."""

    dense_class: type[PreTrainedModel]

    def __init__(self, config: Any, moe_config: MoeLlavaConfig):
        super().__init__(config)
        for index in moe_config.moe_layer_indices:
            self.layers[index].mlp = sparse_mlp(moe_config, self.layers[index])
        if moe_config.routing == "smoes":
            self._keep_in_fp32_modules_strict.add("statistics")  # loads them in float32; transformers has made it a set
        self.post_init()
        # Expert parallelism of transformers, DistributedConfig(ep_size=...): each process holds whole experts and receives their tokens.
        experts = self.layers[moe_config.moe_layer_indices[0]].mlp.experts
        self._ep_plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name, _ in experts.named_parameters()}
        self._ep_plan["layers.*.mlp.experts"] = "ep_dispatch_experts"
        # Kernels read the activation of the experts from their configuration.
        moe_config.hidden_act = activation_name(experts.act_fn)
        # Engines with their own kernels recognise experts by these saved fields. vLLM then assumes SiLU gating, so other experts do not
        # get them: it runs those with the code of this package.
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
    """Return an instance without state, for unpickling."""
    return object.__new__(sparse_backbone_class(dense_class))
