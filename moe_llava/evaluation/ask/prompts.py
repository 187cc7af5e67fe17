"""The text of a question in the model's chat template."""

from __future__ import annotations

from typing import Any

from moe_llava.data.records import IMAGE_TOKEN, PART_TYPES, VIDEO_TOKEN, content_parts
from moe_llava.data.rendering import REFUSALS, own_template
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError


def prompt_text(processor: Any, question: Question, answer: str | None = None) -> str:
    """Return the question in the model's chat template, with an answer if one is given.

    Raises BenchmarkError if the template refuses it, or if the result has more or fewer images or videos than the question.
    """
    token, number = (VIDEO_TOKEN, 1) if question.video is not None else (IMAGE_TOKEN, len(question.images))
    try:
        messages = _messages(question, token, number)
        if answer is not None:
            messages.append({"role": "assistant", "content": content_parts(answer, None)})
        text = processor.apply_chat_template(messages, own_template(processor), add_generation_prompt=answer is None)
    except REFUSALS as error:
        raise BenchmarkError(f"the model's chat template refuses question {question.id}: {error}") from error
    placeholder = processor.image_token if token == IMAGE_TOKEN else processor.video_token
    found = text.count(placeholder)
    if found != number:
        raise BenchmarkError(f"question {question.id} has {found} {placeholder} in its prompt and {number} {PART_TYPES[token]}s")
    return text


def _messages(question: Question, token: str, number: int) -> list[dict[str, Any]]:
    """Return the conversation up to the prompt. Without a placeholder, images or video come first."""
    placed = any(token in text for text in question.texts)
    contents = [content_parts(text, token if placed else None) for text in question.texts]
    if not placed:
        contents[0] = [{"type": PART_TYPES[token]}] * number + contents[0]
    messages: list[dict[str, Any]] = []
    if question.system:
        messages.append({"role": "system", "content": content_parts(question.system, None)})
    for content, (_, answer) in zip(contents, question.history, strict=False):
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": content_parts(answer, None)}]
    return [*messages, {"role": "user", "content": contents[-1]}]
