"""Auxiliary losses of the routers, from recorded logits: balance loss and z-loss. The loss of SMoES is in smoes.py. Targets of the language
loss.

Shapes: B rows, S sequence, K positions, T tokens, E experts, L MoE layers, G groups of N experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .balance import sum_over_processes

IGNORED = -100  # the label of a token that is no target


def balance_loss(
    router_logits: tuple[Tensor, ...],
    token_mask_T: Tensor | None = None,
    groups: list[Tensor] | None = None,
    *,
    first: int = 1,
    rows: int = 1,
    all_processes: bool = False,
) -> Tensor:
    """Return the sum over the MoE layers of E * sum_i f_i * P_i (paper, equation 7).

    f_i is the share of tokens whose first choice is expert i, P_i the mean probability of expert i. Padding is in neither.

    With groups of N experts, a layer's loss is the mean over its groups of N * sum_i f_i * P_i, with f and P normalised within the group.
    It balances the load within each group, not between groups. A group without tokens adds 0.

    Args:
        router_logits: per MoE layer [T, E].
        token_mask_T: [T] bool, False for padding; None if there is none.
        groups: per MoE layer the experts of each group, [G, N]; None for one group.
        first: choices of a token that count as its first: the parts of one FFN, if FFNs are cut.
        rows: into which the tokens are cut; the loss is the mean over those with tokens of each row's loss.
        all_processes: f and P are those of the tokens of all processes together.
    """
    device = router_logits[0].device
    sums_LB2E = torch.stack([_sums(logits_TE, token_mask_T, first, rows).to(device) for logits_TE in router_logits])
    if all_processes:
        sums_LB2E = sum_over_processes(sums_LB2E)
    tokens_LB = sums_LB2E[:, :, 0].sum(dim=-1)
    f_LBE, p_LBE = (sums_LB2E / tokens_LB.clamp(min=1)[..., None, None]).unbind(dim=2)
    if groups is None:
        loss_LB = f_LBE.shape[-1] * (f_LBE * p_LBE).sum(dim=-1)
    else:
        layers = zip(f_LBE, p_LBE, groups, strict=True)
        loss_LB = torch.stack([_balance_within(f_BE, p_BE, groups_GN.to(device)) for f_BE, p_BE, groups_GN in layers])
    seen_LB = (tokens_LB > 0).float()
    return ((loss_LB * seen_LB).sum(dim=-1) / seen_LB.sum(dim=-1).clamp(min=1)).sum()


def z_loss(router_logits: tuple[Tensor, ...], token_mask_T: Tensor | None = None) -> Tensor:
    """Return the sum over the MoE layers of the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5). A layer
    without tokens adds 0."""
    kept = [drop_padding(logits, token_mask_T) for logits in router_logits]
    losses = [(logits if len(logits) else logits.new_zeros(1, 1)).logsumexp(dim=-1).square().mean() for logits in kept]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _sums(logits_TE: Tensor, token_mask_T: Tensor | None, first: int, rows: int) -> Tensor:
    """Return [B, 2, E]: for each row and expert the number of tokens whose first choice it is, a `first`-th of each, and the sum of its
    probabilities."""
    if token_mask_T is not None:
        token_mask_T = token_mask_T.to(logits_TE.device)
        logits_TE = logits_TE.masked_fill(~token_mask_T[:, None], 0.0)  # whatever padding computes, it gets no gradient
    probs_TE = logits_TE.float().softmax(dim=-1)
    chosen_TE = torch.zeros_like(probs_TE).scatter(-1, probs_TE.topk(first, dim=-1).indices, 1 / first)
    both_T2E = torch.stack([chosen_TE, probs_TE], dim=1)
    if token_mask_T is not None:
        both_T2E = both_T2E * token_mask_T[:, None, None]
    return both_T2E.unflatten(0, (rows, -1)).sum(dim=1)


def _balance_within(f_BE: Tensor, p_BE: Tensor, groups_GN: Tensor) -> Tensor:
    """Return the loss [B] of the rows of one layer; a group without tokens adds 0."""
    f_BGN, p_BGN = (share_BE[:, groups_GN] for share_BE in (f_BE, p_BE))
    f_BGN, p_BGN = (share / share.sum(dim=-1, keepdim=True).clamp(min=1e-6) for share in (f_BGN, p_BGN))
    return groups_GN.shape[-1] * (f_BGN * p_BGN).sum(dim=-1).mean(dim=-1)


def drop_padding(rows: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Return the rows of [T, ...] that are not padding."""
    return rows if token_mask_T is None else rows[token_mask_T.to(rows.device)]


def next_labels(labels_BS: Tensor) -> Tensor:
    """Return [B, S]: for each token the label of the next one, which it predicts; -100 for the last."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)


def targets_of(labels_BS: Any, shift_labels_BS: Tensor | None) -> Tensor:
    """Return [B, S]: for each token the label that it predicts, as given or from the labels of the tokens themselves."""
    return next_labels(labels_BS) if shift_labels_BS is None else shift_labels_BS


def logits_at_labels(labels_BS: Tensor) -> dict[str, Tensor]:
    """Return arguments with which transformers' own models compute logits only at the positions [K] where any row has a label, for the same
    loss: `logits_to_keep` [K] and `shift_labels` [B, K]. A sparse model does so by itself, row by row."""
    targets_BS = next_labels(labels_BS)
    labelled = (targets_BS != IGNORED).any(dim=0).nonzero().squeeze(1)
    return {"logits_to_keep": labelled, "shift_labels": targets_BS.index_select(1, labelled)}
