"""Statistics of routing over any number of tokens, in constant memory.

Modality: "image" for the tokens of images, "text" for all others, special ones too.

Pathways (paper, figure 5): a token's pathway is its most probable expert in every MoE layer. E experts in L layers allow E^L pathways, so
hardly two tokens share one. The tokens' probabilities in all layers, L * E numbers each, are therefore reduced to ten principal components,
which keep what tokens have in common; the pathways of these smoothed probabilities are counted.

Shapes: T tokens, L MoE layers, E experts, K experts per token, M modalities (image, text), N tokens in the sample, X = L * E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llava.routing.counts import expert_shares
from moe_llava.routing.tokens import IMAGE, KINDS, MEDIA, RoutingError
from moe_llava.routing.trace import Trace

MODALITIES = ("image", "text")
COMPONENTS = 10
MOST = 10
SAMPLE = 20_000  # tokens


class RoutingStatistics:
    """Sums over the traces of one model. `summary` works at any time."""

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.sample = TokenSample()
        # of text tokens only: an image precedes the question about it
        self.group_counts: dict[str, Tensor] = {}
        self.patches: dict[str, Tensor] = {}

    def add(self, trace: Trace, groups: Sequence[str] | None = None) -> None:
        """Add a trace. `groups`: of each of its rows, such as the family of its question.

        Raise RoutingError if the trace has other layers or experts than those before, or tokens of a video or audio.
        """
        others = sorted({KINDS[kind] for kind in trace.kinds_T.tolist() if kind in MEDIA and kind != IMAGE})
        if others:
            raise RoutingError(f"the trace has {' and '.join(others)} tokens, but statistics compare image tokens with text")
        if not self.layers:
            self._start(trace)
        if (trace.layers, trace.probs_LTE.shape[-1], trace.ids_LTK.shape[-1]) != (self.layers, self.experts, self.top_k):
            raise RoutingError(f"a trace of layers {trace.layers} cannot be added to those of layers {self.layers}: they differ in form")
        modality_T = (trace.kinds_T != IMAGE).long()
        chosen_LTE = F.one_hot(trace.ids_LTK, self.experts).sum(2)
        kept_LTE = (F.one_hot(trace.ids_LTK, self.experts) * ~trace.dropped_LTK[..., None]).sum(2)
        sorted_LTE = F.pad(trace.probs_LTE, (0, 1)).sort(dim=-1, descending=True).values.double()
        entropy_LT = -torch.xlogy(sorted_LTE, sorted_LTE).sum(-1) / np.log(2)
        for number in range(len(MODALITIES)):
            here_T = modality_T == number
            self.tokens_M[number] += here_T.sum()
            self.counts_MLE[number] += chosen_LTE[:, here_T].sum(1)
            self.dropped_MLE[number] += (chosen_LTE - kept_LTE)[:, here_T].sum(1)
            self.entropy_ML[number] += entropy_LT[:, here_T].sum(1)
            self.margin_ML[number] += (sorted_LTE[..., 0] - sorted_LTE[..., 1])[:, here_T].sum(1)
        first_TX = F.one_hot(trace.ids_LTK[..., 0], self.experts).transpose(0, 1).flatten(1).float()
        self.pairs_XX += (first_TX.T @ first_TX).double()
        for row, group in enumerate(groups or []):
            here_T = (trace.rows_T == row) & (modality_T == 1)
            counts_LE = self.group_counts.setdefault(group, torch.zeros_like(self.counts_MLE[0]))
            counts_LE += chosen_LTE[:, here_T].sum(1)
        for label, counts in trace.patches.items():
            self.patches[label] = self.patches.get(label, 0) + torch.tensor(counts)
        self.sample.add(trace.probs_LTE, modality_T)

    def _start(self, trace: Trace) -> None:
        self.layers, self.experts, self.top_k = trace.layers, trace.probs_LTE.shape[-1], trace.ids_LTK.shape[-1]
        layers, experts, modalities = len(self.layers), self.experts, len(MODALITIES)
        self.tokens_M = torch.zeros(modalities, dtype=torch.long)
        self.counts_MLE = torch.zeros(modalities, layers, experts, dtype=torch.long)
        self.dropped_MLE = torch.zeros_like(self.counts_MLE)
        self.entropy_ML = torch.zeros(modalities, layers, dtype=torch.double)
        self.margin_ML = torch.zeros_like(self.entropy_ML)
        # first choices of every pair of layers; X is layer and expert
        self.pairs_XX = torch.zeros(layers * experts, layers * experts, dtype=torch.double)

    def summary(self) -> dict[str, Any]:
        """Return the statistics as JSON types, lists by layer. Raise RoutingError if no trace was added.

        - `layers`, `experts`, `top_k`; `tokens`: of each modality
        - `image`, `text` [L, E]: assignments (each token has K); `load` [L, E]: each expert's share of all of a layer's
        - `image_share` [L, E]: the share of image tokens among those of an expert; None for a dead one
        - `dropped` [L, E]: assignments that were dropped because their expert was full
        - `dead`: layer -> the experts that took no token, for layers with any
        - `entropy`: of each modality, [L]: mean entropy of the router's probabilities in bits; log2(E) if they are equal
        - `margin`: of each modality, [L]: mean difference between the two highest probabilities; both None without tokens
        - `modality_information`, `group_information` [L]: mutual information, in bits, between the expert of an assignment and its
          modality; or, of text, the group of its row; None without groups. `groups` [L, E] of each group: assignments of text
        - `agreement` [L, L]: normalised mutual information of the first choices in two layers: 0 if they are independent, 1 if each
          determines the other. The numbering of experts does not matter.
        - `pathways`: of each modality, from `top_pathways`
        - `patches` [E]: for each router outside the language model, by its label, assignments of patches
        """
        if not self.layers:
            raise RoutingError("there are no statistics of no tokens")
        counts_LE = self.counts_MLE.sum(0)
        grouped = torch.stack(list(self.group_counts.values()), dim=1) if self.group_counts else None
        return {
            "layers": list(self.layers),
            "experts": self.experts,
            "top_k": self.top_k,
            "tokens": self._by_modality(self.tokens_M),
            **self._by_modality(self.counts_MLE),
            "load": expert_shares(counts_LE).tolist(),
            "image_share": [
                [image / total if total else None for image, total in zip(*lines, strict=True)]
                for lines in zip(self.counts_MLE[0].tolist(), counts_LE.tolist(), strict=True)
            ],
            "dropped": self.dropped_MLE.sum(0).tolist(),
            "dead": {
                str(layer): (counts_E == 0).nonzero().flatten().tolist()
                for layer, counts_E in zip(self.layers, counts_LE, strict=True)
                if (counts_E == 0).any()
            },
            "entropy": self._means(self.entropy_ML),
            "margin": self._means(self.margin_ML),
            "modality_information": [mutual_information(table_ME) for table_ME in self.counts_MLE.transpose(0, 1)],
            "group_information": None if grouped is None else [mutual_information(table_GE) for table_GE in grouped],
            "groups": {group: counts.tolist() for group, counts in self.group_counts.items()},
            "agreement": self._agreement(),
            "pathways": {
                name: top_pathways(self.sample.probabilities(number), len(self.layers), self.experts)
                for number, name in enumerate(MODALITIES)
            },
            "patches": {label: counts_E.tolist() for label, counts_E in self.patches.items()},
        }

    def _by_modality(self, values_M: Tensor) -> dict[str, Any]:
        return dict(zip(MODALITIES, values_M.tolist(), strict=True))

    def _means(self, sums_ML: Tensor) -> dict[str, list[float] | None]:
        numbers = self.tokens_M.tolist()
        return {
            name: (sums_L / number).tolist() if number else None for name, sums_L, number in zip(MODALITIES, sums_ML, numbers, strict=True)
        }

    def _agreement(self) -> list[list[float]]:
        """Return mutual information, normalised by the mean of the two entropies; 1 on the diagonal, even for entropies of 0."""
        size = len(self.layers)
        tables_LLEE = self.pairs_XX.view(size, self.experts, size, self.experts).transpose(1, 2)
        entropies = [entropy(tables_LLEE[layer, layer].diagonal()) for layer in range(size)]
        agreement = np.eye(size)
        for one in range(size):
            for other in range(one):
                norm = (entropies[one] + entropies[other]) / 2
                shared = mutual_information(tables_LLEE[one, other]) / norm if norm > 0 else 0.0
                agreement[one, other] = agreement[other, one] = shared
        return agreement.tolist()


def entropy(counts: Tensor) -> float:
    """Return the entropy of a distribution given as counts, in bits."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float(-torch.xlogy(shares, shares).sum() / np.log(2))


def mutual_information(counts_XY: Tensor) -> float:
    """Return the mutual information between row and column of a table of counts, in bits."""
    return max(0.0, entropy(counts_XY.sum(0)) + entropy(counts_XY.sum(1)) - entropy(counts_XY.flatten()))


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
