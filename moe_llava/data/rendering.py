"""Render conversations through a chat template, and find the answers in the text.

A chat template is a program of somebody else. It may mark its answers with `{% generation %}` blocks, or not; refuse a conversation; change
white space around a text; write what belongs to no turn. Nothing here knows a template by name.

Unusual here:
- Without blocks, answers are found by rendering the conversation a second time with a mark in the place of each answer: what stands between
  the marks is not an answer, whatever the answers say.
- What ends a turn is read from a short conversation: the first special token after an answer, or, where there is none, what follows it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from moe_llava.common.errors import DataError
from moe_llava.data.templates import TEMPLATES, chat_template

Message = dict[str, Any]
Span = tuple[int, int]
MARK = "\ue2d4\ue2d5"  # of Unicode's private use, so in no text
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)  # what running a template raises: an error of its input
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOT_BY_TURNS = (
    "the tokenizer's chat template does not add turn to turn, and has no {% generation %} blocks, so its answers cannot be told from the "
    f"rest: name one of {', '.join(TEMPLATES)}"
)


def rendered(messages: list[Message], jinja: str, **settings: Any) -> tuple[str, list[Span]]:
    """(text, [start, end) of each `{% generation %}` block), the latter if `return_assistant_tokens_mask` asks for it.

    Raises DataError with the template's own words if it refuses the messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # takes a second, and reading a file needs none of it

    try:
        texts, spans = render_jinja_template([messages], chat_template=jinja, **settings)
    except REFUSALS as error:
        raise DataError(f"the conversation form refuses it: {error}") from error
    return texts[0], [(low, high) for low, high in spans[0]] if spans else []


def own_template(tokenizer: Any) -> str:
    """Return the chat template of a tokenizer or processor; of several, the default one. Raises DataError if there is none."""
    jinja = tokenizer.chat_template
    jinja = jinja.get("default") if isinstance(jinja, dict) else jinja
    if not jinja:
        raise DataError(f"the tokenizer has no chat template: name one of {', '.join(TEMPLATES)}")
    return jinja


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Return the tokens that chat templates know by name, such as `bos_token`."""
    return {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def render(messages: list[Message], tokenizer: Any, template: str | None) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and the [start, end) of each answer in it: the answer and what ends its turn, and nothing after
    that. An empty answer is not one of them.

    Raises DataError if the tokenizer has no chat template, or one that refuses the messages or does not build a conversation turn by turn.
    """
    if template is not None:
        begin = "" if adds_beginning(tokenizer) else tokenizer.bos_token or ""
        return rendered(messages, chat_template(template), return_assistant_tokens_mask=True, bos_token=begin)
    jinja, special = own_template(tokenizer), special_tokens(tokenizer)
    end = end_of_turn(tokenizer, jinja)
    if not _GENERATION.search(jinja):
        return _render_with_marks(messages, jinja, special, end)
    text, blocks = rendered(messages, jinja, return_assistant_tokens_mask=True, **special)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if len(answers) == len(blocks):
        blocks = [block for block, answer in zip(blocks, answers, strict=True) if answer]
    return text, [_with_end(text, low, high, end) for low, high in blocks]


def check_template(tokenizer: Any, template: str | None) -> None:
    """Raises DataError if the answers of a conversation in this template cannot be told from the rest."""
    render([{"role": role, "content": "x"} for role in ("user", "assistant") * 2], tokenizer, template)


@lru_cache(maxsize=8)
def adds_beginning(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its beginning-of-sequence token before every text."""
    return tokenizer.bos_token is not None and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]


def check_prompt(tokenizer: Any, image: str) -> None:
    """Raises DataError if the tokenizer's chat template cannot ask about an image: `image` must come out once, before the text."""
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARK}]}]
    text, _ = rendered(question, own_template(tokenizer), add_generation_prompt=True, **special_tokens(tokenizer))
    if text.count(image) != 1 or text.count(MARK) != 1 or text.index(image) > text.index(MARK):
        raise DataError(
            f"the model's own chat template cannot ask about an image: of a question with one it makes {text.replace(MARK, '...')!r}, "
            f"which must hold {image} once, before the text: name another one, of {', '.join(TEMPLATES)}, for the model"
        )


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: Any, jinja: str) -> str:
    """Return what ends an answer in a chat template, "" if nothing does or the template has no place for an answer."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    _, _, rest = rendered(turns, jinja, **special_tokens(tokenizer))[0].partition(MARK)
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    ends = [rest.index(token) + len(token) for token in tokens if token in rest]
    return rest[: min(ends)] if ends else rest.rstrip() or rest


def _with_end(text: str, low: int, high: int, end: str) -> Span:
    """A block that ends where its turn does: it may hold more than the turn, or leave out what ends it."""
    inside = text.rfind(end, low, high) if end else -1
    if inside >= 0 and not text[inside + len(end) : high].strip():
        return low, inside + len(end)
    return low, high + len(end) if text.startswith(end, high) else high


def _render_with_marks(messages: list[Message], jinja: str, special: dict[str, str], end: str) -> tuple[str, list[Span]]:
    """As `render`, of a template without blocks. An answer begins where the prompt for it ends."""
    whole, _ = rendered(messages, jinja, **special)
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant" and message["content"]]
    marked = [message | {"content": MARK} if index in indices else message for index, message in enumerate(messages)]
    first, *others = rendered(marked, jinja, **special)[0].split(MARK)
    if len(others) != len(indices) or not whole.startswith(first):
        raise DataError(_NOT_BY_TURNS)
    at, answers = len(first), []
    for index, after in zip(indices, others, strict=True):
        content = messages[index]["content"]
        variants = (content, content.strip(), content.rstrip(), content.lstrip())  # templates trim
        answer = next((variant for variant in variants if whole.startswith(variant + after, at)), None)
        prompt, _ = rendered(messages[:index], jinja, add_generation_prompt=True, **special)
        if answer is None or len(prompt) > at or not whole.startswith(prompt):
            raise DataError(_NOT_BY_TURNS)
        stop = at + len(answer)
        answers.append((len(prompt), stop + len(end) if whole.startswith(end, stop) else stop))
        at = stop + len(after)
    return whole, answers
