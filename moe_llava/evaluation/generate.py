"""Batched greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_llava.data.records import IMAGE_TOKEN, Record, open_image

MAX_NEW_TOKENS = 40


@torch.inference_mode()
def answer_records(model: Any, processor: Any, records: Sequence[Record], batch_size: int) -> list[str]:
    """The model's answer to the first question of each record."""
    answers: list[str] = []
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        inputs = prompt_inputs(processor, batch).to(model.device, dtype=model.dtype)
        generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def prompt_inputs(processor: Any, records: Sequence[Record]) -> Any:
    """Model inputs of the records' first questions, padded on the left, so that every answer begins at the same position."""
    prompts = [processor.apply_chat_template(record.messages()[:1], add_generation_prompt=True) for record in records]
    # A record's images stand in the order of its turns, so the first question's come first.
    asked = [(record, path) for record in records for path in record.images[: record.turns[0][0].count(IMAGE_TOKEN)]]
    images = [open_image(path, record.source) for record, path in asked] or None
    return processor(text=prompts, images=images, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
