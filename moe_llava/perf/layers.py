"""The feed-forward layers that `bench layer` compares: of the same size and, except the dense one, with the same weights; and their
reference in float64.

Shapes: T tokens, D width, F FFN width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.integrations.deepgemm import is_deepgemm_loadable
from transformers.integrations.sonicmoe import is_sonicmoe_loadable
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration
from moe_llava.model.moe import SparseMlp
from moe_llava.perf.options import BenchError, LayerSize
from moe_llava.perf.rivals import DEEPSPEED, MIXTRAL, RIVALS, output_of, rivals_of, with_weights

DENSE, OURS = "dense", "ours"
BACKENDS = ("eager", "grouped_mm", "batched_mm")  # of transformers' experts interface
KERNELS = {"sonicmoe": is_sonicmoe_loadable, "deepgemm": is_deepgemm_loadable}  # of the same, from the package kernels, for GPUs
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative, of outputs and gradients
CHECKED_TOKENS = 64
# Its router computes in the dtype of the model: in half precision some tokens may go to other experts.
CHECKED_IN_FLOAT32 = (MIXTRAL,)


def random_weights(size: LayerSize, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return router [E, D], gate and up [E, 2F, D], down [E, D, F], scaled such that activations keep their scale."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (size.experts, size.width), (size.experts, 2 * size.ffn_width, size.width), (size.experts, size.width, size.ffn_width)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) * shape[-1] ** -0.5 for shape in shapes]


def dense_layer(size: LayerSize, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the limit: the FFN of transformers' Llama, `top_k` times as wide."""
    with torch.device(device):
        config = LlamaConfig(hidden_size=size.width, intermediate_size=size.top_k * size.ffn_width, num_attention_heads=1)
        return LlamaMLP(config).to(dtype)


def our_layer(size: LayerSize, weights: list[Tensor], backend: str | None = None) -> SparseMlp:
    """Return the SparseMlp of a model with one layer. `backend`: default that of a model."""
    config = MoeLlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
        text_config=LlamaConfig(
            hidden_size=size.width, intermediate_size=size.ffn_width, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        ),
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        moe_layers="all",
    )
    with torch.device("meta"):
        model = MoeLlavaForConditionalGeneration._from_config(config, dtype=weights[0].dtype)
    if backend is not None:
        model.set_experts_implementation(backend)
    return with_weights(model.sparse_mlps()[0], ("router.weight", "experts.gate_up_proj", "experts.down_proj"), weights)


def layer_variants(size: LayerSize, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, nn.Module], list[str]]:
    """Return (name -> layer, the limit first; notes on variants that are left out)."""
    weights = random_weights(size, dtype, device)
    ours = our_layer(size, weights)
    rivals, notes = rivals_of(ours)
    variants = {DENSE: dense_layer(size, dtype, device), OURS: ours}
    for backend in BACKENDS:
        copied, room = size.copied_by_batched_mm * dtype.itemsize, room_for_copies(device)
        if backend == "batched_mm" and copied > room:
            notes.append(f"{size}: batched_mm left out, as it would copy {copied / 1e9:,.1f} GB of weights (allowed: {room / 1e9:,.1f})")
        else:
            variants[f"{OURS}, {backend}"] = our_layer(size, weights, backend)
    if device.type == "cuda":
        kernels, reasons = kernel_variants(size, weights)
        variants |= kernels
        notes += reasons
    return variants | {name: RIVALS[name](ours) for name in rivals}, notes


def kernel_variants(size: LayerSize, weights: list[Tensor]) -> tuple[dict[str, nn.Module], list[str]]:
    """Return (name -> layer with the kernels that can be loaded here; notes on the others). Each is called once, which loads it."""
    variants: dict[str, nn.Module] = {}
    notes = []
    for name, check in KERNELS.items():
        layer = our_layer(size, weights, name)
        try:
            check(raise_error=True)
            with torch.no_grad():
                output_of(layer, weights[0].new_zeros(1, 1, size.width))
        except (ImportError, NotImplementedError, ValueError) as error:
            notes.append(f"{size}, {weights[0].dtype}: {name} left out: {error}")
        else:
            variants[f"{OURS}, {name}"] = layer
    return variants, notes


def room_for_copies(device: torch.device) -> int:
    """Return how many bytes batched_mm may copy."""
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 10**9


def errors(
    size: LayerSize, variants: dict[str, nn.Module], dtype: torch.dtype, device: torch.device, backward: bool = True
) -> dict[str, float]:
    """Return for every sparse variant the largest relative error, against float64, of the output and, with `backward`, of the gradients of
    input and weights, on up to CHECKED_TOKENS tokens.

    Raise BenchError if one is above TOLERANCE: only variants that compute the same are compared.
    """
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, min(size.tokens, CHECKED_TOKENS), size.width)
    x_1TD, gradient_1TD = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    expected = _reference(random_weights(size, dtype, device), size.top_k, x_1TD, gradient_1TD if backward else None)
    found = {}
    for name, layer in variants.items():
        if name == DENSE:
            continue
        got = _outcome(layer, x_1TD, gradient_1TD if backward else None)
        # DeepSpeed's parameters are not stacked: the gradients of its weights are left out.
        compared = got[:2] if name == DEEPSPEED else got
        found[name] = max(relative(one, other) for one, other in zip(compared, expected, strict=name != DEEPSPEED))
        if found[name] > TOLERANCE[dtype] and (dtype == torch.float32 or name not in CHECKED_IN_FLOAT32):
            allowed = f"{TOLERANCE[dtype]:.0e}"
            raise BenchError(f"{size} in {dtype}: {name} is {found[name]:.1e} off the reference in float64 (allowed: {allowed})")
    return found


def _outcome(layer: nn.Module, x_1TD: Tensor, gradient_1TD: Tensor | None) -> list[Tensor | None]:
    """Return the output and, if the output's gradient is given, the gradients of input and parameters."""
    if gradient_1TD is None:
        with torch.no_grad():
            return [output_of(layer, x_1TD)]
    x_1TD = x_1TD.clone().requires_grad_()
    out_1TD = output_of(layer, x_1TD)
    out_1TD.backward(gradient_1TD)
    got = [out_1TD.detach(), x_1TD.grad, *(parameter.grad for parameter in layer.parameters())]
    layer.zero_grad()
    return got


def _reference(weights: list[Tensor], top_k: int, x_1TD: Tensor, gradient_1TD: Tensor | None) -> list[Tensor]:
    """Return in float64 the output and, if its gradient is given, the gradients of input, router, gate and up, down; one expert after
    another. Experts are chosen in float32, as in the router, so that rounding does not change the choice."""
    choices_TE = x_1TD[0].float() @ weights[0].float().T
    router_ED, gate_up_EFD, down_EDF = (weight.double().requires_grad_() for weight in weights)
    x_TD = x_1TD[0].double().requires_grad_()
    ids_TK = choices_TE.topk(top_k, dim=-1).indices
    weights_TK = (x_TD @ router_ED.T).gather(-1, ids_TK).softmax(dim=-1)  # of the chosen alone: they sum to 1
    y_TD = torch.zeros_like(x_TD)
    for expert, (gate_up_FD, down_DF) in enumerate(zip(gate_up_EFD, down_EDF, strict=True)):
        gate_TF, up_TF = (x_TD @ gate_up_FD.T).chunk(2, dim=-1)
        share_T = (weights_TK * (ids_TK == expert)).sum(dim=-1)
        y_TD = y_TD + share_T[:, None] * ((F.silu(gate_TF) * up_TF) @ down_DF.T)
    if gradient_1TD is None:
        return [y_TD.detach()[None]]
    gradients = torch.autograd.grad(y_TD, (x_TD, router_ED, gate_up_EFD, down_EDF), gradient_1TD[0].double())
    return [y_TD.detach()[None], gradients[0][None], *gradients[1:]]


def relative(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))
