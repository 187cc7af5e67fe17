"""Choose the next tokens of completions, for all rows of the batch at once: only one number per row leaves the model's device.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """How a completion is sampled: from the most likely tokens whose probabilities sum to `top_p`, at `temperature` (above 0).

    Its random numbers come from the CPU, so that a seed determines the completion on any device and in any batch.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None):
        self.temperature = temperature
        self.top_p = top_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def random(self) -> float:
        """Return a random number above 0 and up to 1."""
        return 1 - float(torch.rand((), dtype=torch.float64, generator=self._generator))


def choose(samplers: Sequence[Sampler | None], logits_BV: Tensor) -> list[int]:
    """Return a token for each row, the most likely one if the row has no sampler; -1 if its largest logit is not finite.
    `logits_BV`: float32."""
    largest_B, tokens_B = logits_BV.max(-1)
    rows = [row for row, sampler in enumerate(samplers) if sampler]
    if rows:
        tokens_B[rows] = _sample([sampler for sampler in samplers if sampler], logits_BV[rows], tokens_B[rows])
    return tokens_B.where(largest_B.isfinite(), -1).tolist()


def _sample(samplers: Sequence[Sampler], logits_BV: Tensor, likeliest_B: Tensor) -> Tensor:
    """Return a token for each row [B], never one of probability 0. `likeliest_B`: the most likely tokens."""
    numbers_B3 = logits_BV.new_tensor([(sampler.temperature, sampler.top_p, sampler.random()) for sampler in samplers])
    temperature_B1, top_p_B1, random_B1 = numbers_B3.split(1, dim=1)
    probs_BV = (logits_BV / temperature_B1).softmax(-1)
    rows = [row for row, sampler in enumerate(samplers) if sampler.top_p < 1]
    if rows:  # sorting takes far longer than the rest
        probs_BV[rows] = _most_likely(probs_BV[rows], top_p_B1[rows])
    sums_BV = probs_BV.cumsum(-1)
    drawn_B1 = torch.searchsorted(sums_BV, random_B1 * sums_BV[:, -1:]).clamp(max=sums_BV.shape[1] - 1)
    # On a GPU the sums are rounded independently, so the one found may belong to a token of probability 0, once in millions of draws.
    return likeliest_B.where(probs_BV.gather(1, drawn_B1)[:, 0] == 0, drawn_B1[:, 0])


def _most_likely(probs_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """Return the probabilities, 0 for all but the most likely tokens that sum to `top_p_B1`. One token is always kept."""
    sorted_BV, order_BV = probs_BV.sort(descending=True)
    sorted_BV[:, 1:].masked_fill_(sorted_BV.cumsum(-1)[:, :-1] >= top_p_B1, 0)
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)
