"""Calibration: does a model's probability of yes agree with how often yes is right?

The expected calibration error is that of Guo et al. (arXiv 1706.04599), here of the probability of yes: within BINS of equal width, the
share of questions whose answer is yes should be the mean probability. Brier's score (1950) is the mean squared error of the probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moe_llava.evaluation.ask.generate import prompt_inputs
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.model.greedy import prefill_positions

BINS = 10


def yes_or_no(questions: Sequence[Question]) -> list[Question]:
    """Return the questions whose expected answer is yes or no."""
    return [question for question in questions if question.extra.get("answer") in ("yes", "no")]


@torch.inference_mode()
def yes_probabilities(
    model: Any, processor: Any, questions: Sequence[Question], batch_size: int, advance: Callable[[int], None] = lambda number: None
) -> list[float]:
    """Return p(yes) / (p(yes) + p(no)) for the first token of each answer. `advance` is called with the size of each batch.

    Raises BenchmarkError if the two words have the same first token.
    """
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    if yes == no:
        raise BenchmarkError(f"the tokenizer begins yes and no with the same token, {yes}: calibration needs two")
    found: list[float] = []
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        inputs = prompt_inputs(processor, batch).to(model.device, dtype=model.dtype)
        logits_BV = model(**inputs, position_ids=prefill_positions(model, inputs), logits_to_keep=1).logits[:, -1].float()
        found += torch.sigmoid(logits_BV[:, yes] - logits_BV[:, no]).tolist()
        advance(len(batch))
    return found


def calibration(probabilities: Sequence[float], truths: Sequence[bool]) -> dict[str, Any]:
    """Return `error` (expected calibration error), `brier`, `n`, and `bins`: for each bin with questions their number `n`, the mean
    `probability`, and the share `affirm` whose answer is yes."""
    p_N, truth_N = np.asarray(probabilities, dtype=float), np.asarray(truths, dtype=float)
    bin_N = np.minimum((p_N * BINS).astype(int), BINS - 1)
    bins = []
    for number in np.unique(bin_N):
        here = bin_N == number
        bins.append({"n": int(here.sum()), "probability": float(p_N[here].mean()), "affirm": float(truth_N[here].mean())})
    error = sum(each["n"] * abs(each["probability"] - each["affirm"]) for each in bins) / len(p_N)
    return {"error": error, "brier": float(((p_N - truth_N) ** 2).mean()), "n": len(p_N), "bins": bins}
