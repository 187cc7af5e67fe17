"""The engine completes prompts of any family as `generate` does."""

import queue

import pytest
import torch
from PIL import Image

from moe_llava import upcycle
from moe_llava.data.rendering import make_portable
from moe_llava.model.greedy import end_tokens, write_greedily
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prompt import PromptBuilder
from moe_llava.serving.engine.requests import Request
from tests.families.processors import ROWS, tiny_model, tiny_processor

PICTURES = [Image.new("RGB", size, (60 * number, 200, 90)) for number, size in enumerate(((40, 30), (20, 60), (33, 33)))]


def messages_of(question, images):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


def made(family):
    processor = tiny_processor(family)
    processor.chat_template = processor.tokenizer.chat_template = make_portable(
        processor.chat_template, processor.tokenizer, processor.image_token
    )
    return upcycle(tiny_model(family, processor), num_experts=4, num_experts_per_tok=2), processor


def alone(model, prompt, limit):
    """The tokens that transformers generates, up to an end."""
    ids = torch.tensor([prompt.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.inputs}
    written = write_greedily(model, inputs, limit)[0, ids.shape[1] :].tolist()
    end = next((place for place, token in enumerate(written) if token in end_tokens(model)), len(written))
    return written[: end + 1]


@pytest.mark.parametrize("family", sorted(ROWS))
def test_completions_are_those_of_generate(family):
    """Prompts of several lengths, with one image, two and none; some join while others are running."""
    model, processor = made(family)
    builder = PromptBuilder(processor)
    asked = [("What is in the picture?", PICTURES[:1]), ("Compare.", PICTURES[1:]), ("Why?", []), ("Where is the red one?", PICTURES[2:])]
    prompts = [builder.build(messages_of(question, len(images)), images, len(images)) for question, images in asked]
    expected = [alone(model, prompt, 8 + number) for number, prompt in enumerate(prompts)]
    delivered = [queue.Queue() for _ in prompts]
    with Engine(model, processor.tokenizer, slots=2) as engine:
        for number, (prompt, pieces) in enumerate(zip(prompts, delivered, strict=True)):
            engine.submit(Request(prompt, 8 + number), pieces.put)
    for wanted, pieces in zip(expected, delivered, strict=True):
        found = [pieces.get() for _ in range(pieces.qsize())]
        assert not any(isinstance(piece, Exception) for piece in found), found
        assert [piece.token for piece in found] == wanted


def test_a_model_whose_states_cannot_be_batched_is_refused():
    model, processor = made("qwen3_5")
    model.config.get_text_config().layer_types = ["linear_attention", "conv"]
    with pytest.raises(ValueError, match="has layers of conv, whose states the engine cannot batch"):
        Engine(model, processor.tokenizer)
