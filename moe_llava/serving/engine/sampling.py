"""Choose the next token of a completion.

Shapes: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper


class Sampler:
    """Sample from the most likely tokens whose probabilities sum to `top_p`, at `temperature` (above 0).

    It samples on the CPU, so that a seed determines the completion on any device and in any batch.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None):
        self._warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def draw(self, logits_V: Tensor) -> int:
        """Return a token. `logits_V`: float32."""
        scores_1V = logits_V[None]
        for warper in self._warpers:
            scores_1V = warper(None, scores_1V)
        return int(torch.multinomial(scores_1V.softmax(-1).cpu(), 1, generator=self._generator))
