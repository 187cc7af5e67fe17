"""SMoES (arXiv 2604.23996), soft modality-guided routing in its Gaussian form: how a MoE layer learns which modality a token is like, and
which experts belong together.

Unusual here:
- Routing itself stays as it is, a token's top k of all experts. What guides it is a loss: experts stand in bins, and the bin that a
  token goes to shall tell its modality.
- A layer's statistics are running ones, kept in buffers. A batch is judged by what was known before it; only after the forward pass does
  the model let the statistics learn from it. So gradient checkpointing, which runs the layers again, counts nothing twice.

Shapes: T tokens, D model width, E experts, K experts per token, M = 2 modalities (IMAGE, TEXT), G bins of N experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from transformers import initialization as init

from .moe import drop_padding

if TYPE_CHECKING:
    from .configuration import MoeLlavaConfig

IMAGE, TEXT = 0, 1
MOMENTUM = 0.99
TEMPERATURE = 0.5  # times the width
TINY = 1e-6


class ModalityStatistics(nn.Module):
    """What one layer knows of its modalities, each a diagonal Gaussian over the router's inputs.

    Buffers: `mean` and `var` [M, D] of the inputs; `load` [M, E], each expert's share of a modality's assignments, zero until there was a
    token of it. The first batch that has any sets the values of a modality, later ones move them by 1 - MOMENTUM, and batches without
    leave them.
    """

    mean: Tensor
    var: Tensor
    load: Tensor

    def __init__(self, config: MoeLlavaConfig, width: int):
        super().__init__()
        self.bin_size = config.expert_bin_size
        self.register_buffer("mean", torch.empty(2, width))
        self.register_buffer("var", torch.empty(2, width))
        self.register_buffer("load", torch.empty(2, config.num_experts))
        self.reset()

    def reset(self) -> None:
        """Forgets everything; what a checkpoint has filled is left alone."""
        init.zeros_(self.mean)
        init.ones_(self.var)
        init.zeros_(self.load)

    @property
    def seen(self) -> Tensor:
        """[M] bool: whether there was a token of the modality yet."""
        return self.load.sum(dim=-1) > 0

    @torch.no_grad()
    def forward(self, x_TD: Tensor, ids_TK: Tensor, image_mask_T: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the modality scores [T, M] of router inputs, each row of sum 1, and what `update` takes, [M, 1 + E + 2 D]: of a
        modality's tokens the number, the assignments to each expert, and the sums over tokens of (x - mean) and (x - mean)^2. Padding
        (False in `token_mask_T`) is in none of these sums.

        Sums about the running mean, because those about 0 would lose the variance to rounding where it is small beside the mean.
        """
        image_T = image_mask_T.to(x_TD.device)
        real_T = torch.ones_like(image_T) if token_mask_T is None else token_mask_T.to(x_TD.device)
        modality_MT = torch.stack([image_T & real_T, ~image_T & real_T]).float()
        taken_TE = F.one_hot(ids_TK, self.load.shape[-1]).sum(dim=1)
        likelihoods, sums = [], []
        for mean_D, var_D, mask_T in zip(self.mean.float(), self.var.float(), modality_MT, strict=True):
            var_D = var_D.clamp(min=TINY)
            from_mean_TD = x_TD.float() - mean_D
            squared_TD = from_mean_TD.square()
            likelihoods.append(-0.5 * (var_D.log() + squared_TD / var_D).sum(dim=-1))
            parts = (torch.ones_like(mask_T)[:, None], taken_TE, from_mean_TD, squared_TD)
            sums.append(torch.cat([(part * mask_T[:, None]).sum(dim=0) for part in parts]))
        likelihood_TM = torch.stack(likelihoods, dim=-1).masked_fill(~self.seen, torch.finfo(torch.float32).min)
        return (likelihood_TM / (TEMPERATURE * x_TD.shape[-1])).softmax(dim=-1), torch.stack(sums)

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Learns from a batch, given the second part of what `forward` returned for it.

        Raises ValueError if the statistics are in half precision, in which steps of 1 - MOMENTUM would be rounded away.
        """
        if self.mean.dtype != torch.float32:
            raise ValueError(f"the statistics of SMoES are in {self.mean.dtype}, but learn in float32 only: train float32 weights")
        width, num_experts = self.mean.shape[-1], self.load.shape[-1]
        number_M1, taken_ME, first_MD, second_MD = sums.split([1, num_experts, width, width], dim=-1)
        present_M1 = number_M1 > 0
        shift_MD, square_MD = first_MD / number_M1.clamp(min=1), second_MD / number_M1.clamp(min=1)
        step_M1 = torch.where(self.seen[:, None], 1 - MOMENTUM, 1.0) * present_M1
        self.var.lerp_(square_MD - shift_MD.square(), step_M1)
        self.mean.add_(step_M1 * shift_MD)
        self.load.lerp_(taken_ME / taken_ME.sum(dim=-1, keepdim=True).clamp(min=1), step_M1)

    def bins(self) -> Tensor:
        """[G, N]: the experts, sorted from those of images to those of text, in bins. An expert that no token took counts as half."""
        preference_E = (self.load[TEXT] + TINY) / (self.load.sum(dim=0) + 2 * TINY)
        return preference_E.sort(stable=True).indices.view(-1, self.bin_size)


def sum_over_processes(sums: Tensor) -> Tensor:
    """The sum over the processes of a run, each of which sees its part of a batch; of a single process, what was given."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums


def mutual_information_loss(
    router_logits: tuple[Tensor, ...],
    modality_scores: tuple[Tensor, ...],
    bins: list[Tensor],
    token_mask_T: Tensor | None = None,
) -> Tensor:
    """Sum over the MoE layers of -I(modality; bin), each at least -log 2.

    S[m, B] = sum over experts e in B and tokens j of M_jm p_je / (N sum_j M_jm), p the router's probabilities; P = S / sum S.

    Args:
        router_logits, modality_scores, bins: per MoE layer [T, E], [T, M] and [G, N]. Only the logits get a gradient.
        token_mask_T: [T] bool, False for padding; None if there is none.
    """
    losses = [
        _layer_mutual_information(drop_padding(logits, token_mask_T), drop_padding(scores, token_mask_T), bins_GN)
        for logits, scores, bins_GN in zip(router_logits, modality_scores, bins, strict=True)
    ]
    return -torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _layer_mutual_information(logits_TE: Tensor, scores_TM: Tensor, bins_GN: Tensor) -> Tensor:
    # Not a matrix product, which autocast would compute in half precision.
    shares_ME = (scores_TM[:, :, None] * logits_TE.float().softmax(dim=-1)[:, None, :]).sum(dim=0)
    shares_ME = shares_ME / scores_TM.sum(dim=0)[:, None].clamp(min=TINY)
    s_MG = shares_ME[:, bins_GN].mean(dim=-1)
    p_MG = s_MG / s_MG.sum().clamp(min=TINY)
    return _entropy(p_MG.sum(dim=0)) + _entropy(p_MG.sum(dim=1)) - _entropy(p_MG)


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-30).log()).sum()
