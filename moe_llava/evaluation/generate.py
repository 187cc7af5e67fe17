"""The one way to ask: greedy answers in batches, to questions of any benchmark."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from moe_llava.data.records import IMAGE_TOKEN, content_parts, open_image
from moe_llava.evaluation.benchmark import BenchmarkError, Question

AHEAD = 3  # batches that wait, decoded

Item = TypeVar("Item")
Made = TypeVar("Made")


def answer(
    model: Any, processor: Any, questions: Sequence[Question], batch_size: int, max_new_tokens: int
) -> Iterator[list[tuple[int, str]]]:
    """Yields (index, answer) of each question, batch by batch. A batch has prompts of about one length, and where it can the same
    prompt, to which answers are of about one length, too; the longest come first, so that memory runs out at once or never.

    Raises BenchmarkError before the first answer if a prompt and its images do not fit; DataError if an image cannot be decoded.
    """
    if processor.tokenizer.pad_token_id is None:
        raise BenchmarkError("the tokenizer has no pad token, which batches are padded with")
    texts = [prompt_text(processor, question) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: (len(questions[index].images), len(texts[index]), texts[index]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # The processor's belongs to the thread that makes inputs: a tokenizer cannot be used by two at a time.
    tokenizer = copy.deepcopy(processor.tokenizer)
    made = in_background(lambda batch: prompt_inputs(processor, [questions[index] for index in batch]), batches)
    for batch, inputs in zip(batches, made, strict=True):
        yield list(zip(batch, _generate(model, tokenizer, inputs, max_new_tokens), strict=True))


def prompt_text(processor: Any, question: Question) -> str:
    """The question as the model's conversation form has it. Raises BenchmarkError if that has more or fewer images than the question."""
    parts = content_parts(question.prompt)
    if IMAGE_TOKEN not in question.prompt:
        parts = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": question.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    found = text.count(processor.image_token)
    if found != len(question.images):
        raise BenchmarkError(f"question {question.id} has {found} {processor.image_token} in its prompt and {len(question.images)} images")
    return text


def prompt_inputs(processor: Any, questions: Sequence[Question]) -> Any:
    """Model inputs, padded on the left, so that every answer begins at the same position."""
    texts = [prompt_text(processor, question) for question in questions]
    images = [open_image(image, f"question {question.id}") for question in questions for image in question.images] or None
    return processor(text=texts, images=images, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    inputs = inputs.to(model.device, dtype=model.dtype)
    # A placeholder in an answer would be one without an image.
    never = sorted({*(model.generation_config.suppress_tokens or []), model.config.image_token_id})
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, suppress_tokens=never)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for row in generated[:, inputs["input_ids"].shape[1] :].tolist():
        # What follows an end pads the row, with a token that need not be a special one.
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        answers.append(tokenizer.decode(row[:length], skip_special_tokens=True).strip())
    return answers


def in_background(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """What `make` makes of each, in order, in a thread that is a few ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
