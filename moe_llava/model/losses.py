"""Auxiliary losses of the routers, from recorded logits: balance loss and z-loss. The loss of SMoES is in smoes.py. Targets of the language
loss.

Shapes: B rows, S sequence, T tokens, E experts, G groups of N experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is no target


def balance_loss(router_logits: tuple[Tensor, ...], token_mask_T: Tensor | None = None, groups: list[Tensor] | None = None) -> Tensor:
    """Return the sum over the MoE layers of E * sum_i f_i * P_i (paper, equation 7).

    f_i is the share of tokens whose first choice is expert i, P_i the mean probability of expert i. Padding is in neither.

    With groups of N experts, a layer's loss is the mean over its groups of N * sum_i f_i * P_i, with f and P normalised within the group.
    It balances the load within each group, not between groups.

    Args:
        router_logits: per MoE layer [T, E].
        token_mask_T: [T] bool, False for padding; None if there is none.
        groups: per MoE layer the experts of each group, [G, N]; None for one group.
    """
    logits = [drop_padding(logits_TE, token_mask_T) for logits_TE in router_logits]
    if groups is None:
        losses = [_layer_balance(logits_TE) for logits_TE in logits]
    else:
        losses = [_balance_within(logits_TE, groups_GN) for logits_TE, groups_GN in zip(logits, groups, strict=True)]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def z_loss(router_logits: tuple[Tensor, ...], token_mask_T: Tensor | None = None) -> Tensor:
    """Return the sum over the MoE layers of the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    losses = [drop_padding(logits, token_mask_T).logsumexp(dim=-1).square().mean() for logits in router_logits]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _layer_balance(logits_TE: Tensor) -> Tensor:
    first_choice_E, mean_E = _shares(logits_TE)
    return logits_TE.shape[-1] * (first_choice_E * mean_E).sum()


def _balance_within(logits_TE: Tensor, groups_GN: Tensor) -> Tensor:
    """Return the loss of one layer; a group without tokens adds 0."""
    f_GN, p_GN = (share_E[groups_GN] for share_E in _shares(logits_TE))
    f_GN, p_GN = (share_GN / share_GN.sum(dim=-1, keepdim=True).clamp(min=1e-6) for share_GN in (f_GN, p_GN))
    return groups_GN.shape[-1] * (f_GN * p_GN).sum(dim=-1).mean()


def _shares(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return per expert the share of tokens whose first choice it is, [E], and its mean probability, [E]."""
    probs_TE = logits_TE.float().softmax(dim=-1)
    first_choice_E = F.one_hot(probs_TE.argmax(dim=-1), probs_TE.shape[-1]).float().mean(dim=0)
    return first_choice_E, probs_TE.mean(dim=0)


def drop_padding(rows: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Return the rows of [T, ...] that are not padding."""
    return rows if token_mask_T is None else rows[token_mask_T.to(rows.device)]


def next_labels(labels_BS: Tensor) -> Tensor:
    """Return [B, S]: for each token the label of the next one, which it predicts; -100 for the last."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)


def targets_of(labels_BS: Any, shift_labels_BS: Tensor | None) -> Tensor:
    """Return [B, S]: for each token the label that it predicts, as given or from the labels of the tokens themselves."""
    return next_labels(labels_BS) if shift_labels_BS is None else shift_labels_BS
