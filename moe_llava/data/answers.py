"""Find the answers in what a chat template renders: the targets of training.

A template may or may not mark its answers with `{% generation %}` blocks, change white space around a text, or write what belongs to no
turn. Nothing here knows a template by name.

Unusual here:
- Without blocks, answers are found by rendering the conversation a second time with a mark in place of each answer. The text between the
  marks is not an answer, whatever the answers say.
- The end of a turn is read from a short conversation: the first special token after an answer or, without one, all that follows it.
- Questions are given to a tokenizer's own template as parts, as in chat, server and evaluation, so that training sees the same prompts.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.data.records import IMAGE_TOKEN, content_parts
from moe_llava.data.rendering import MARK, Message, Span, adds_bos, make_portable, own_template, run_template, special_tokens
from moe_llava.data.templates import TEMPLATES, chat_template

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOT_BY_TURNS = (
    "the tokenizer's chat template does not add turn to turn, and has no {% generation %} blocks, so its answers cannot be found: "
    f"name one of {', '.join(TEMPLATES)}"
)


def render(
    messages: list[Message], tokenizer: Any, template: str | None, image: str | None = None, token: str = IMAGE_TOKEN
) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and [start, end) of each answer in it: the answer and what ends its turn, nothing after that.
    Empty answers are left out. With `image`, which is what the template renders for an image, `token` in a question is an image or a video.

    Raises DataError if the tokenizer has no chat template, or one that refuses the messages or does not build a conversation turn by turn.
    """
    if template is not None:
        bos = "" if adds_bos(tokenizer) else tokenizer.bos_token or ""
        return run_template(messages, chat_template(template), return_assistant_tokens_mask=True, bos_token=bos)
    special = special_tokens(tokenizer)
    jinja = make_portable(own_template(tokenizer), tokenizer, image or placeholder(tokenizer, None))
    messages = [
        message
        if message["role"] == "assistant"
        else message | {"content": content_parts(message["content"], token if image is not None and token in message["content"] else None)}
        for message in messages
    ]
    end = end_of_turn(tokenizer, jinja)
    if not _GENERATION.search(jinja):
        return _render_with_marks(messages, jinja, special, end)
    text, blocks = run_template(messages, jinja, return_assistant_tokens_mask=True, **special)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if len(answers) == len(blocks):
        blocks = [block for block, answer in zip(blocks, answers, strict=True) if answer]
    return text, [_with_end(text, low, high, end) for low, high in blocks]


def placeholder(tokenizer: Any, template: str | None) -> str:
    """Return what a chat template renders for an image, where there is no processor that says so."""
    return IMAGE_TOKEN if template is not None else getattr(tokenizer, "image_token", None) or IMAGE_TOKEN


def check_template(tokenizer: Any, template: str | None) -> None:
    """Raise DataError if the answers of a conversation in this chat template cannot be found."""
    render([{"role": role, "content": "x"} for role in ("user", "assistant") * 2], tokenizer, template)


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: Any, jinja: str) -> str:
    """Return what ends an answer in a chat template: "" if nothing does, or if the template renders no answers."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    _, _, rest = run_template(turns, jinja, **special_tokens(tokenizer))[0].partition(MARK)
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    ends = [rest.index(token) + len(token) for token in tokens if token in rest]
    return rest[: min(ends)] if ends else rest.rstrip() or rest


def _with_end(text: str, low: int, high: int, end: str) -> Span:
    """Return the span of a block up to the end of its turn: the block may hold more than the turn, or leave out what ends it."""
    inside = text.rfind(end, low, high) if end else -1
    if inside >= 0 and not text[inside + len(end) : high].strip():
        return low, inside + len(end)
    return low, high + len(end) if text.startswith(end, high) else high


def _render_with_marks(messages: list[Message], jinja: str, special: dict[str, str], end: str) -> tuple[str, list[Span]]:
    """Do the same as `render` for a template without blocks. An answer begins at the end of the prompt for it."""
    whole, _ = run_template(messages, jinja, **special)
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant" and message["content"]]
    marked = [message | {"content": MARK} if index in indices else message for index, message in enumerate(messages)]
    first, *others = run_template(marked, jinja, **special)[0].split(MARK)
    if len(others) != len(indices) or not whole.startswith(first):
        raise DataError(_NOT_BY_TURNS)
    at, answers = len(first), []
    for index, after in zip(indices, others, strict=True):
        content = messages[index]["content"]
        variants = (content, content.strip(), content.rstrip(), content.lstrip())  # templates trim
        answer = next((variant for variant in variants if whole.startswith(variant + after, at)), None)
        prompt, _ = run_template(messages[:index], jinja, add_generation_prompt=True, **special)
        if answer is None or len(prompt) > at or not whole.startswith(prompt):
            raise DataError(_NOT_BY_TURNS)
        stop = at + len(answer)
        answers.append((len(prompt), stop + len(end) if whole.startswith(end, stop) else stop))
        at = stop + len(after)
    return whole, answers
