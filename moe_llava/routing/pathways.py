"""The pathways that most tokens take through the layers (paper, figure 5).

A token's pathway is its most probable expert in every MoE layer. E experts in L layers allow E^L pathways, so hardly two tokens share one.
The tokens' probabilities in all layers, L * E numbers each, are therefore reduced to ten principal components, which keep what tokens have
in common; the pathways of these smoothed probabilities are counted.

Shapes: T tokens, L MoE layers, E experts, N tokens in the sample, X = L * E.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

COMPONENTS = 10
MOST = 10
SAMPLE = 20_000  # tokens


class TokenSample:
    """A uniform sample of the tokens added: each gets a random number from a fixed seed, and the smallest are kept."""

    def __init__(self, size: int = SAMPLE):
        self.size = size
        self.generator = torch.Generator().manual_seed(0)
        self.keys_N = torch.empty(0)
        self.modality_N = torch.empty(0, dtype=torch.long)
        self.probs_NX = torch.empty(0, 0, dtype=torch.half)

    def add(self, probs_LTE: Tensor, modality_T: Tensor) -> None:
        probs_TX = probs_LTE.transpose(0, 1).flatten(1).half()
        keys = torch.cat([self.keys_N, torch.rand(len(modality_T), generator=self.generator)])
        kept = keys.argsort()[: self.size]
        self.keys_N = keys[kept]
        self.modality_N = torch.cat([self.modality_N, modality_T])[kept]
        self.probs_NX = torch.cat([self.probs_NX.view(-1, probs_TX.shape[1]), probs_TX])[kept]

    def probabilities(self, modality: int) -> np.ndarray:
        """Return [N, X] of the sampled tokens of one modality."""
        return self.probs_NX[self.modality_N == modality].numpy().astype(np.float64)


def top_pathways(probs_NX: np.ndarray, layers: int, experts: int) -> dict[str, Any]:
    """Return `paths`: the ten most frequent, each with `experts` (one for each layer) and `share` of the tokens; `explained`: the share of
    the variance that the principal components keep; `tokens`: their number."""
    number = len(probs_NX)
    if not number:
        return {"paths": [], "explained": None, "tokens": 0}
    centred_NX = probs_NX - probs_NX.mean(axis=0)
    variances_X, axes_XX = np.linalg.eigh(centred_NX.T @ centred_NX)  # in rising order
    axes_XC = axes_XX[:, -COMPONENTS:]
    smooth_NX = centred_NX @ axes_XC @ axes_XC.T + probs_NX.mean(axis=0)
    paths, counts = np.unique(smooth_NX.reshape(number, layers, experts).argmax(axis=2), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST]
    total = variances_X.sum()
    return {
        "paths": [{"experts": paths[index].tolist(), "share": counts[index] / number} for index in order],
        "explained": float(variances_X[-COMPONENTS:].sum() / total) if total > 0 else 1.0,
        "tokens": number,
    }
