"""Sparse upcycling: a dense LLaVA becomes a sparse one that computes the same (paper, section 3.3, stage III; arXiv 2212.05055)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from .configuration import MoeLlavaConfig
from .ffn import copy_into_experts, find_form
from .modeling import MoeLlavaForConditionalGeneration
from .moe import SparseMlp

ROUTER_STD = 0.02


@torch.no_grad()
def upcycle(
    dense: LlavaForConditionalGeneration,
    *,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    moe_layers: str | list[int] = "interval",
    norm_topk_prob: bool = True,
    router_aux_loss_coef: float = 0.01,
    router_z_loss_coef: float = 0.0,
    capacity_factor: float | None = None,
    use_residual: bool = False,
    seed: int = 0,
) -> MoeLlavaForConditionalGeneration:
    """Copies the FFN of each chosen layer into `num_experts` experts behind a router with a small random start.

    With `norm_topk_prob` (and no capacity) the result computes what `dense` computes. With one expert per token and `norm_topk_prob` the
    weight is always 1, so that only the balance loss teaches the router.

    Args:
        dense: any LLaVA of transformers. All its parameters but the replaced FFNs are shared with the result, not copied: training one
            changes the other. Its mode (train or eval), dtype and device are kept.
        seed: of the routers' start.
        The others are the fields of MoeLlavaConfig.

    Raises:
        TypeError: `dense` is no LlavaForConditionalGeneration.
        ValueError: `dense` is sparse already, a setting breaks a rule of MoeLlavaConfig, or the FFN of this family is not known (see
            ffn.py).
    """
    if isinstance(dense, MoeLlavaForConditionalGeneration):
        raise ValueError("this model is sparse already: upcycle its dense origin")
    if not isinstance(dense, LlavaForConditionalGeneration):
        raise TypeError(f"upcycle takes a LlavaForConditionalGeneration, not a {type(dense).__name__}")
    config = sparse_config(
        dense.config,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_layers=moe_layers,
        norm_topk_prob=norm_topk_prob,
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        capacity_factor=capacity_factor,
        use_residual=use_residual,
    )
    dense_layers = dense.model.language_model.layers
    for index in config.moe_layer_indices:
        find_form(dense_layers[index])

    with torch.device("meta"):
        sparse = MoeLlavaForConditionalGeneration._from_config(config, dtype=dense.dtype)
    _share(dense, sparse)
    generator = torch.Generator().manual_seed(seed)
    for index, mlp in sparse.model.sparse_mlps().items():
        _fill(mlp, dense_layers[index].mlp, generator)
    sparse.tie_weights()
    sparse.generation_config = copy.deepcopy(dense.generation_config)
    return sparse.train(dense.training)


def _fill(mlp: SparseMlp, ffn: nn.Module, generator: torch.Generator) -> None:
    """Gives a SparseMlp without weights those of the dense FFN in whose place it stands, and a random router."""
    origin = next(ffn.parameters())  # device and dtype of this FFN: towers and language models may differ
    mlp.to_empty(device=origin.device).to(origin.dtype)
    mlp.router.weight.copy_(torch.randn(mlp.router.weight.shape, generator=generator) * ROUTER_STD)
    copy_into_experts(ffn, mlp.experts)
    if mlp.coefficient is not None:
        mlp.residual_mlp = ffn
        mlp.coefficient.weight.copy_(torch.randn(mlp.coefficient.weight.shape, generator=generator) * ROUTER_STD)
        mlp.coefficient.bias.zero_()


def sparse_config(dense: LlavaConfig, **moe: Any) -> MoeLlavaConfig:
    """The configuration of a dense LLaVA, made sparse; `moe` are the fields that MoeLlavaConfig adds.

    Raises ValueError as MoeLlavaConfig does.
    """
    settings = copy.deepcopy(dense).to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"):
        settings.pop(name, None)
    config = MoeLlavaConfig(**settings, **moe)
    # Not part of what `to_dict` gives.
    config._attn_implementation = {"": dense._attn_implementation} | {
        name: getattr(dense, name)._attn_implementation for name in dense.sub_configs
    }
    return config


def _share(dense: LlavaForConditionalGeneration, sparse: MoeLlavaForConditionalGeneration) -> None:
    """Puts every parameter and buffer of `dense` that `sparse` also has into its place there, the same tensors."""
    for name, module in sparse.named_modules(remove_duplicate=False):
        try:
            origin = dense.get_submodule(name)
        except AttributeError:
            continue  # part of a SparseMlp
        for key in module._parameters.keys() & origin._parameters.keys():
            module._parameters[key] = origin._parameters[key]
        for key in module._buffers.keys() & origin._buffers.keys():
            module._buffers[key] = origin._buffers[key]
