"""Experts as linear layers, which bitsandbytes can quantise, and not as stacks; and errors of bitsandbytes 0.50.2 on a CPU.

With 4 bits, wrong weights are computed if the width of the input is no multiple of 64, the weights that have a scale: the norm of the error
was 14 to 40% of that of the weights, against 9%. With AVX512-BF16, layers are repacked in their first forward pass outside training. From
then on they have no gradient, and scales are stored transposed, so that a model that was used and then saved would compute something else.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from moe_llava.common.errors import CheckpointError

_STACK = re.compile(r"(?P<matrix>.+\.mlp\.experts\.(?:gate_up_proj|up_proj|down_proj))(?P<bias>_bias)?")


def separated(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, with each stack [E, ...] of experts as views of its E parts, named as `Experts.separate` does."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        found = _STACK.fullmatch(name)
        if found is None:
            tensors[name] = tensor
            continue
        kind = "bias" if found["bias"] else "weight"
        tensors |= {f"{found['matrix']}.{expert}.{kind}": part for expert, part in enumerate(tensor)}
    return tensors


def separate_experts(model: Any) -> None:
    """Replace the stacked experts of a sparse model by linear layers."""
    for mlp in model.sparse_mlps().values():
        mlp.experts.separate()
    model.config.separate_experts = True


def stack_experts(model: Any) -> None:
    """Undo `separate_experts`: replace the linear layers, which must not be quantised, by stacks."""
    for mlp in model.sparse_mlps().values():
        experts = mlp.experts
        for name in experts.matrices:
            layers = getattr(experts, name)
            delattr(experts, name)
            setattr(experts, name, nn.Parameter(torch.stack([layer.weight.detach() for layer in layers])))
            if layers[0].bias is not None:
                setattr(experts, f"{name}_bias", nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])))
    model.config.separate_experts = False


def check_widths(model: nn.Module, name: str) -> None:
    """Raise CheckpointError if a layer of 4 bits cannot be computed on the CPU. `name`: that of the checkpoint."""
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not hasattr(module, "quant_state") or module.weight.device.type != "cpu":
            continue
        if module.in_features % 64 or module.out_features % 32:
            widths = f"{module.in_features} to {module.out_features}"
            raise CheckpointError(
                f"{name} with 4 bits needs layers from multiples of 64 to multiples of 32 on a CPU, but {layer} is of {widths}: use 8 bits"
            )


def keep_unpacked(model: nn.Module) -> None:
    """Make layers of 4 bits compute as in training also outside of it, which takes longer, so that they keep their gradient."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def restore_scales(model: nn.Module, *_: Any) -> None:
    """Put the scales of repacked layers in the order in which they are stored. A hook before the state dict of `model` is made;
    bitsandbytes restores the rest then."""
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            state.absmax = state.absmax.T.float().reshape(-1)
