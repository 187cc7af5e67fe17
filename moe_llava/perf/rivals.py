"""Other implementations of a sparse layer, made from one of ours: they share its weights, and compute the same.

Shapes: B batch, S sequence, N rows, D width, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_llava.model.grouped import linear
from moe_llava.model.moe import Experts, GatedExperts, SparseMlp
from moe_llava.model.options import MoeOptions

MIXTRAL, DEEPSPEED = "transformers' Mixtral", "DeepSpeed"


class OneExpert(nn.Module):
    """One expert as a module, as DeepSpeed needs it."""

    def __init__(self, experts: Experts, index: int):
        super().__init__()
        self.ffn = experts.ffn
        for name, weight in experts.each()(index).items():
            self.register_parameter(name, nn.Parameter(weight.detach()))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.ffn(x_ND, partial(linear, dict(self.named_parameters())))


def mixtral_layer(mlp: SparseMlp) -> nn.Module:
    """Return the MoE block of a Mixtral, with the backend that transformers chooses."""
    experts = mlp.experts
    config = MixtralConfig(
        hidden_size=experts.hidden_dim,
        intermediate_size=experts.intermediate_dim,
        num_local_experts=experts.num_experts,
        num_experts_per_tok=mlp.router.top_k,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=8,
    )
    with torch.device("meta"):
        block: Any = MixtralModel._from_config(config, dtype=mlp.router.weight.dtype).layers[0].mlp
    block.experts.act_fn = experts.act_fn
    weights = [mlp.router.weight, *(getattr(experts, name) for name in experts.stacked)]
    return with_weights(block, ("gate.weight", "experts.gate_up_proj", "experts.down_proj"), weights)


def deepspeed_layer(mlp: SparseMlp) -> nn.Module:
    """Return DeepSpeed's MoE without dropping or randomness. With all experts in one process it needs no process group."""
    os.environ.setdefault("DS_ACCELERATOR", mlp.router.weight.device.type)  # DeepSpeed warns if it has to look for one
    from deepspeed.moe.layer import MoE

    experts, count = mlp.experts, mlp.experts.num_experts
    switches = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False, "min_capacity": 0}
    layer: Any = MoE(experts.hidden_dim, nn.Identity(), num_experts=count, k=mlp.router.top_k, **switches)
    layer.deepspeed_moe.gate.wg.weight = nn.Parameter(mlp.router.weight.detach().float())
    layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(OneExpert(experts, index) for index in range(count))
    return layer


RIVALS: dict[str, Callable[[SparseMlp], nn.Module]] = {MIXTRAL: mixtral_layer, DEEPSPEED: deepspeed_layer}


def with_weights(module: nn.Module, names: tuple[str, ...], weights: list[Tensor]) -> Any:
    """Replace the parameters of `module` by these tensors, which variants share without sharing gradients."""
    module.load_state_dict({name: weight.detach() for name, weight in zip(names, weights, strict=True)}, assign=True)
    return module


def rivals_of(mlp: SparseMlp) -> tuple[list[str], list[str]]:
    """Return (names in RIVALS that can compute the same as `mlp`, notes on the others)."""
    left_out = {}
    if not isinstance(mlp.experts, GatedExperts):
        left_out[MIXTRAL] = f"{MIXTRAL} block: left out, as its experts are gated"
    if find_spec("deepspeed") is None:
        left_out[DEEPSPEED] = "DeepSpeed's MoE layer: not installed"
    elif mlp.router.top_k == 1:
        left_out[DEEPSPEED] = "DeepSpeed's MoE layer: left out with top-1, whose weight it does not normalise to 1"
    return [name for name in RIVALS if name not in left_out], list(left_out.values())


def output_of(layer: nn.Module, x_BSD: Tensor) -> Tensor:
    """Return the output alone: DeepSpeed returns its loss too."""
    out = layer(x_BSD)
    return out[0] if isinstance(out, tuple) else out


class RivalMlp(nn.Module):
    """Another implementation in the place of `layer.mlp`: [B, S, D] -> [B, S, D]. In training `balance_loss` is that of the last pass."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer
        self.balance_loss = torch.zeros(())
        if hasattr(layer, "gate"):  # Mixtral's block drops what its router returns
            layer.gate.register_forward_hook(self._keep_loss)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out = self.layer(x_BSD)
        if not isinstance(out, tuple):
            return out
        self.balance_loss = out[1]
        return out[0]

    def _keep_loss(self, gate: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        if self.training:
            self.balance_loss = load_balancing_loss_func((outputs[0],), gate.num_experts, gate.top_k)


def rival_mlps(model: nn.Module) -> list[RivalMlp]:
    return [module for module in model.modules() if isinstance(module, RivalMlp)]


def loss_with_balance(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of a model with RivalMlps: its own, and their balance losses with the weight that is our default."""
    loss = model(**batch).loss
    return loss + MoeOptions.router_aux_loss_coef * sum(layer.balance_loss for layer in rival_mlps(model))
