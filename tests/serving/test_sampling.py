"""Tokens are drawn with the probabilities of transformers' warpers, all rows of a step at once."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from moe_llava.serving.engine.sampling import Sampler, choose

VOCABULARY = 151_936  # Qwen's


class Operators(TorchDispatchMode):
    """Count the operators that are called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Fixed(Sampler):
    """A sampler whose random number is given."""

    def __init__(self, number, top_p=1.0):
        super().__init__(1.0, top_p, 0)
        self.random = lambda: number


def logits_of(*probs):
    return torch.tensor(probs).log()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (1.0, 0.5), (2.0, 1e-50)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p):
    """Within five standard deviations; what has a probability of 0 is never drawn."""
    logits_V = logits_of(0.0, 0.1, 0.0, 0.35, 0.3, 0.25, 0.0)
    warped_1V = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits_V[None]))
    expected_V = warped_1V.softmax(-1)[0]
    sampler, draws = Sampler(temperature, top_p, 0), 4000
    found_V = torch.tensor(choose([sampler] * draws, logits_V.repeat(draws, 1))).bincount(minlength=7) / draws
    assert ((found_V - expected_V).abs() <= 5 * (expected_V * (1 - expected_V) / draws).sqrt()).all()


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_the_ends_of_the_sum_are_tokens_with_a_probability(top_p):
    torch.manual_seed(0)
    logits_V = torch.randn(VOCABULARY)
    logits_V[[0, 1, -2, -1]] = -torch.inf
    lowest, highest = choose([Fixed(2.0**-53, top_p), Fixed(1.0, top_p)], logits_V.repeat(2, 1))
    assert lowest == (2 if top_p == 1 else lowest)
    assert highest == (VOCABULARY - 3 if top_p == 1 else highest)
    assert logits_V[[lowest, highest]].isfinite().all()
    assert choose([Fixed(0.5), Fixed(0.50001)], logits_of(0.0, 0.5, 0.0, 0.5).repeat(2, 1)) == [1, 3]


def test_beyond_a_sum_that_was_rounded_down_comes_the_most_likely():
    assert choose([Fixed(1.01)], logits_of(0.3, 0.7, 0.0)[None]) == [1]


def test_a_row_is_drawn_as_it_would_be_alone():
    torch.manual_seed(0)
    logits_BV = torch.randn(5, 1000)
    settings = [(1.0, 1.0), None, (0.7, 0.9), (2.0, 1.0), (1.0, 0.3)]

    def samplers():
        return [setting and Sampler(*setting, seed) for seed, setting in enumerate(settings)]

    alone = [choose([sampler], logits_V[None])[0] for sampler, logits_V in zip(samplers(), logits_BV, strict=True)]
    assert choose(samplers(), logits_BV) == alone
    assert alone[1] == int(logits_BV[1].argmax())


def test_a_row_without_finite_logits_gets_no_token():
    logits_BV = logits_of(0.5, 0.5).repeat(5, 1)
    logits_BV[1, 0], logits_BV[2, 1], logits_BV[3] = torch.nan, torch.inf, -torch.inf
    for sampler in (None, Sampler(1.0, 1.0, 0)):
        assert [token >= 0 for token in choose([sampler] * 5, logits_BV)] == [True, False, False, False, True]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_are_drawn_together(top_p):
    """One random number per row; everything else once per step, and a sort only where it is needed."""

    def calls(rows):
        with Operators() as operators:
            choose([Sampler(1.0, top_p, seed) for seed in range(rows)], torch.zeros(rows, 1000))
        return operators.calls

    one, eight = calls(1), calls(8)
    per_row = {"rand", "_local_scalar_dense"}
    assert {name: number for name, number in eight.items() if number != one[name] and name not in per_row} == {}
    assert eight["sort"] == (top_p < 1)
    assert eight["multinomial"] == 0
