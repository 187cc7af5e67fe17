"""The sparse feed-forward network: Router, stacked experts, SparseMlp, and the router's losses.

Unusual here:
- Experts are stacked 3-D parameters under transformers' experts interface, so `model.set_experts_implementation("grouped_mm" |
  "batched_mm" | "eager")` and the kernels behind it apply. By default it is "auto": for each call what measurements found to be fastest.
- The router always computes in float32, autocast or not, as the published models do.
- What a token's modality says about its experts, if anything, is the configuration's `routing`: here a mask over the logits, in smoes.py a
  loss.
- A dropped assignment (see `capacity_factor`) keeps its expert index and gets weight 0: shapes never depend on the data.

Shapes: B batch, S sequence, T = B * S tokens, D model width, F FFN width, E experts, K experts per token, G groups of N experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from .grouped import combine, dispatch, grouped_linear, sort_by_expert

if TYPE_CHECKING:
    from .configuration import MoeLlavaConfig
    from .smoes import ModalityStatistics

Activation = Callable[[Tensor], Tensor]


class Router(nn.Module):
    """Chooses K of E experts for every token (paper, equation 5)."""

    def __init__(self, config: MoeLlavaConfig, width: int):
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.capacity_factor = config.capacity_factor
        self.modality_split = config.routing == "modality_split"
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))

    def forward(
        self, x_TD: Tensor, token_mask_T: Tensor | None = None, image_mask_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns logits [T, E] float32, weights [T, K] float32, expert indices [T, K] in order of falling probability, and
        dropped [T, K] bool. `token_mask_T`, bool, tells tokens from padding where a capacity is shared out; None: every token counts.
        `image_mask_T`, bool, tells image tokens from text where the modalities have experts of their own."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
        if self.modality_split:
            logits_TE = self._own_half(logits_TE, image_mask_T)
        probs_TK, ids_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        dropped_TK = self._over_capacity(ids_TK, token_mask_T)
        weights_TK = probs_TK.masked_fill(dropped_TK, 0.0)
        if self.norm_topk_prob:
            # A token that lost all its experts keeps weights of 0.
            total_T1 = weights_TK.sum(dim=-1, keepdim=True)
            weights_TK = weights_TK / total_T1.masked_fill(total_T1 == 0, 1.0)
        return logits_TE, weights_TK, ids_TK, dropped_TK

    def _own_half(self, logits_TE: Tensor, image_mask_T: Tensor | None) -> Tensor:
        """Logits that leave image tokens the first half of the experts, and text the second: those of the others give probability 0. They
        are not infinite, so that what is computed from recorded logits, such as entropies, stays finite."""
        if image_mask_T is None:
            raise RuntimeError("routing is modality_split, but the router was not told which tokens are of an image")
        of_image_E = torch.arange(self.num_experts, device=logits_TE.device) < self.num_experts // 2
        other_TE = image_mask_T.to(logits_TE.device)[:, None] != of_image_E
        return logits_TE.masked_fill(other_TE, torch.finfo(logits_TE.dtype).min)

    def _over_capacity(self, ids_TK: Tensor, token_mask_T: Tensor | None) -> Tensor:
        """Which assignments find their expert full. First choices go before second ones, and earlier tokens before later."""
        if self.capacity_factor is None:
            return torch.zeros_like(ids_TK, dtype=torch.bool)
        counts_T = torch.ones_like(ids_TK[:, 0], dtype=torch.bool) if token_mask_T is None else token_mask_T.to(ids_TK.device)
        if counts_T.shape[0] != ids_TK.shape[0]:
            raise RuntimeError(f"the router got {ids_TK.shape[0]} tokens, but its token mask has {counts_T.shape[0]}")
        # In float64, less a hair: 25 tokens * 1.2 / 2 must give 15 places, not 16.
        capacity = torch.ceil(counts_T.sum().double() * self.top_k * self.capacity_factor / self.num_experts - 1e-9)
        taken_KTE = F.one_hot(ids_TK.T, self.num_experts) * counts_T[None, :, None]
        # How many assignments of the same expert came before, in the order (choice, token).
        before_KTE = taken_KTE.flatten(0, 1).cumsum(0).view_as(taken_KTE) - taken_KTE
        before_TK = before_KTE.gather(-1, ids_TK.T[..., None]).squeeze(-1).T
        return (before_TK >= capacity) & counts_T[:, None]


FEW_ROWS = 64  # below, an accelerator copies the matrices of each row's expert sooner than it sorts rows; benchmarks/gpu.sh measures it


def choose_backend(x_TD: Tensor, ids_TK: Tensor, experts: Experts) -> str:
    """The fastest of the experts' backends for what is to be computed, where that is known (docs/performance.md)."""
    device = x_TD.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return "eager"  # the others would compute in the weights' type
    if torch.compiler.is_compiling():
        return "grouped_mm"  # the loop breaks the graph
    if device == "cpu":
        return "eager"
    return "batched_mm" if ids_TK.numel() <= FEW_ROWS and not torch.is_grad_enabled() else "grouped_mm"


def automatic_experts_forward(experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    name = choose_backend(x_TD, ids_TK, experts)
    forward = Experts.forward if name == "eager" else ALL_EXPERTS_FUNCTIONS[name]
    return forward(experts, x_TD, ids_TK, weights_TK)


# Where transformers looks for all of them, so that it is a valid name for every part of a model.
ALL_EXPERTS_FUNCTIONS.register("auto", automatic_experts_forward)


class Experts(nn.Module):
    """E copies of an FFN as stacked parameters. Subclasses say which parameters there are and how one expert computes."""

    def __init__(self, config: MoeLlavaConfig, width: int, ffn_width: int, act_fn: Activation):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = width
        self.intermediate_dim = ffn_width
        self.act_fn = act_fn

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over each token's experts of weight times output. This is the "eager" backend: a loop over the experts."""
        return self._loop(x_TD, ids_TK, weights_TK)

    # How many rows an expert has depends on the data. Not on `forward`: transformers' wrapper would inherit it.
    @torch.compiler.disable
    def _loop(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        order = sort_by_expert(ids_TK, self.num_experts)
        return combine(self.apply_experts(dispatch(x_TD, order), order.counts), weights_TK, order).to(x_TD.dtype)

    def apply_experts(self, x_SD: Tensor, counts: list[int]) -> Tensor:
        """[S, D], rows sorted by expert -> [S, D], given the rows of each expert."""
        raise NotImplementedError


@use_experts_implementation
class GatedExperts(Experts):
    """down(act(gate(x)) * up(x)), no biases: llama, mistral, qwen, stablelm, gemma."""

    def __init__(self, config: MoeLlavaConfig, width: int, ffn_width: int, act_fn: Activation):
        super().__init__(config, width, ffn_width, act_fn)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * ffn_width, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, ffn_width))

    def apply_experts(self, x_SD: Tensor, counts: list[int]) -> Tensor:
        gate_SF, up_SF = grouped_linear(x_SD, self.gate_up_proj, counts).chunk(2, dim=-1)
        return grouped_linear(self.act_fn(gate_SF) * up_SF, self.down_proj, counts)


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainExperts(Experts):
    """down(act(up(x))), with biases: phi."""

    def __init__(self, config: MoeLlavaConfig, width: int, ffn_width: int, act_fn: Activation):
        super().__init__(config, width, ffn_width, act_fn)
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, ffn_width, width))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, ffn_width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, ffn_width))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, width))

    def apply_experts(self, x_SD: Tensor, counts: list[int]) -> Tensor:
        hidden_SF = self.act_fn(grouped_linear(x_SD, self.up_proj, counts, self.up_proj_bias))
        return grouped_linear(hidden_SF, self.down_proj, counts, self.down_proj_bias)


class SparseMlp(nn.Module):
    """Takes the place of `layer.mlp`: [B, S, D] -> [B, S, D] (paper, equations 4 to 6).

    With `residual_mlp` (the dense FFN), a token's output is c_0 * experts(x) + c_1 * residual_mlp(x), c = softmax(coefficient(x)).

    `token_mask` and `image_mask` [T] bool, set by the model before each forward pass, go to the router. They stand here, and not there,
    because an adapter may wrap the router. They outlive the forward pass, because gradient checkpointing routes again during backward.

    `statistics`, there with SMoES, looks on: the model records what it returns.
    """

    def __init__(
        self, router: Router, experts: Experts, residual_mlp: nn.Module | None = None, statistics: ModalityStatistics | None = None
    ):
        super().__init__()
        self.router = router
        self.experts = experts
        self.residual_mlp = residual_mlp
        self.coefficient = None if residual_mlp is None else nn.Linear(experts.hidden_dim, 2)
        self.statistics = statistics
        self.token_mask: Tensor | None = None
        self.image_mask: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        _, weights_TK, ids_TK, _ = self.router(x_TD, self.token_mask, self.image_mask)
        if self.statistics is not None:
            self.statistics(x_TD, ids_TK, self.image_mask, self.token_mask)
        y_BSD = self.experts(x_TD, ids_TK, weights_TK.to(x_TD.dtype)).view_as(x_BSD)
        if self.residual_mlp is None or self.coefficient is None:
            return y_BSD
        share_BS2 = self.coefficient(x_BSD).softmax(dim=-1)
        return y_BSD * share_BS2[..., :1] + self.residual_mlp(x_BSD) * share_BS2[..., 1:]


def init_sparse_weights(module: nn.Module, std: float) -> None:
    """Random start of a Router or Experts that no checkpoint fills; other modules are left alone."""
    if not isinstance(module, Router | Experts):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("_bias"):
            init.zeros_(parameter)
        else:
            init.normal_(parameter, mean=0.0, std=std)


def balance_loss(router_logits: tuple[Tensor, ...], token_mask_T: Tensor | None = None, groups: list[Tensor] | None = None) -> Tensor:
    """Sum over the MoE layers of E * sum_i f_i * P_i (paper, equation 7).

    f_i is the share of tokens whose first choice is expert i, P_i the mean probability of expert i. Padding counts in neither.

    With groups, of N experts each, it is the mean over a layer's groups of N * sum_i f_i * P_i over the group, whose f and P are divided
    by their sums there: the load is to be even within groups, whatever goes to each.

    Args:
        router_logits: per MoE layer [T, E].
        token_mask_T: [T] bool, False for padding; None if there is none.
        groups: per MoE layer the experts of each group, [G, N]; None: all are one group.
    """
    logits = [drop_padding(logits_TE, token_mask_T) for logits_TE in router_logits]
    if groups is None:
        losses = [_layer_balance(logits_TE) for logits_TE in logits]
    else:
        losses = [_balance_within(logits_TE, groups_GN) for logits_TE, groups_GN in zip(logits, groups, strict=True)]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def z_loss(router_logits: tuple[Tensor, ...], token_mask_T: Tensor | None = None) -> Tensor:
    """Sum over the MoE layers of the mean of logsumexp(logits)^2 over tokens (ST-MoE, arXiv 2202.08906, equation 5)."""
    losses = [drop_padding(logits, token_mask_T).logsumexp(dim=-1).square().mean() for logits in router_logits]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _layer_balance(logits_TE: Tensor) -> Tensor:
    first_choice_E, mean_E = _shares(logits_TE)
    return logits_TE.shape[-1] * (first_choice_E * mean_E).sum()


def _balance_within(logits_TE: Tensor, groups_GN: Tensor) -> Tensor:
    """A group that nothing goes to adds nothing."""
    f_GN, p_GN = (share_E[groups_GN] for share_E in _shares(logits_TE))
    f_GN, p_GN = (share_GN / share_GN.sum(dim=-1, keepdim=True).clamp(min=1e-6) for share_GN in (f_GN, p_GN))
    return groups_GN.shape[-1] * (f_GN * p_GN).sum(dim=-1).mean()


def _shares(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Of each expert: the share of tokens whose first choice it is, and its mean probability."""
    probs_TE = logits_TE.float().softmax(dim=-1)
    first_choice_E = F.one_hot(probs_TE.argmax(dim=-1), probs_TE.shape[-1]).float().mean(dim=0)
    return first_choice_E, probs_TE.mean(dim=0)


def drop_padding(rows: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """The rows of [T, ...] that are tokens."""
    return rows if token_mask_T is None else rows[token_mask_T.to(rows.device)]
