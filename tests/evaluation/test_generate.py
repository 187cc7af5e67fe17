"""Answers do not depend on the company a question keeps in its batch."""

import torch

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.data.records import Record
from moe_llava.data.store import load_records
from moe_llava.evaluation.generate import answer_records, prompt_inputs
from tests.training.conftest import tiny_base  # noqa: F401


def test_a_batch_answers_as_one_by_one(tiny_base):  # noqa: F811
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.float32)
    records = load_records(tiny_base / "data" / "test.json", tiny_base / "data" / "images")[:9]
    lengths = {len(record.turns[0][0].split()) for record in records}
    assert len(lengths) > 1
    together = answer_records(model, processor, records, batch_size=4)
    assert together == [answer_records(model, processor, [record], batch_size=1)[0] for record in records]


def test_only_the_first_question_and_its_images(tiny_base):  # noqa: F811
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.float32)
    image = tiny_base / "data" / "images" / "test" / "000000.png"
    text = Record("text", (("is there a red 7 ?", "yes"), ("<image> and here ?", "no")), (image,))
    assert "pixel_values" not in prompt_inputs(processor, [text])
    both = Record("both", (("<image> where ?", "left"), ("<image> and here ?", "no")), (image, image))
    assert len(prompt_inputs(processor, [text, both])["pixel_values"]) == 1
    assert len(answer_records(model, processor, [text, both], batch_size=2)) == 2


def test_prompts_are_padded_on_the_left(tiny_base):  # noqa: F811
    _, processor = load_checkpoint(tiny_base / "base")
    records = load_records(tiny_base / "data" / "test.json", tiny_base / "data" / "images")[:9]
    inputs = prompt_inputs(processor, records)
    assert inputs["attention_mask"][:, -1].all()
    assert not inputs["attention_mask"][:, 0].all()
    assert (inputs["input_ids"][:, -1] == processor.tokenizer.convert_tokens_to_ids("assistant:")).all()
