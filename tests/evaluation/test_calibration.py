"""Calibration against numbers worked out by hand; probabilities against the model's own logits."""

import pytest
import torch

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.evaluation.ask.calibration import calibration, yes_or_no, yes_probabilities
from moe_llava.evaluation.ask.generate import prompt_inputs
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.evaluation.score.reading import BenchmarkError
from tests.training.conftest import tiny_base  # noqa: F401


def test_by_hand():
    found = calibration([0.05, 0.05, 0.85, 0.95, 1.0], [False, True, True, True, False])
    assert found["bins"] == [
        {"n": 2, "probability": pytest.approx(0.05), "affirm": 0.5},
        {"n": 1, "probability": pytest.approx(0.85), "affirm": 1.0},
        {"n": 2, "probability": pytest.approx(0.975), "affirm": 0.5},
    ]
    assert found["error"] == pytest.approx((2 * 0.45 + 0.15 + 2 * 0.475) / 5)
    assert found["brier"] == pytest.approx((0.05**2 + 0.95**2 + 0.15**2 + 0.05**2 + 1) / 5)
    assert calibration([0.0, 1.0], [False, True])["error"] == 0


def test_probabilities_are_the_models_own_in_any_batch(tiny_base):  # noqa: F811
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.float32)
    asked = digits_world.questions(tiny_base / "data")
    questions = yes_or_no(asked)
    assert {question.extra["family"] for question in questions} == {"existence"}
    assert len(questions) == sum(question.extra["family"] == "existence" for question in asked)
    done = []
    together = yes_probabilities(model, processor, questions, 5, done.append)
    assert sum(done) == len(together) == len(questions)
    vocabulary = processor.tokenizer.get_vocab()
    for question, probability in zip(questions, together, strict=True):
        with torch.inference_mode():
            logits_V = model(**prompt_inputs(processor, [question])).logits[0, -1]
        yes, no = logits_V.softmax(-1)[[vocabulary["yes"], vocabulary["no"]]].tolist()
        assert probability == pytest.approx(yes / (yes + no), abs=1e-4)
    assert len({round(probability, 4) for probability in together}) > 1

    class OneWord:
        def __call__(self, text, **settings):
            return {"input_ids": [7]}

    processor.tokenizer = OneWord()
    with pytest.raises(BenchmarkError, match="begins yes and no with the same token, 7"):
        yes_probabilities(model, processor, questions, 5)
