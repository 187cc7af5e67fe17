"""How an answer's next token is chosen.

Shapes: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper


class Sampler:
    """Draws from the likeliest tokens that together have the probability `top_p`, after `temperature` (above 0).

    It draws on the CPU, so that a seed gives one answer, whatever the model runs on and whoever is in the batch.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None):
        self._warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def draw(self, logits_V: Tensor) -> int:
        """`logits_V`: float32."""
        scores_1V = logits_V[None]
        for warper in self._warpers:
            scores_1V = warper(None, scores_1V)
        return int(torch.multinomial(scores_1V.softmax(-1).cpu(), 1, generator=self._generator))
