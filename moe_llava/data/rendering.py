"""Run chat templates, and make them take every kind of content: a string, or a list of parts with images among them.

Templates are programs of somebody else: they may refuse a conversation, or fail on it. Those of text models add `message['content']` to a
string, and fail on the parts that transformers, vLLM and clients send. Others iterate over parts, and lose a string, or write a placeholder
of their own for an image. `make_portable` puts a few lines before such a template, which convert the messages; the rest stays the
template's.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from moe_llava.common.errors import DataError
from moe_llava.data.templates import TEMPLATES

Message = dict[str, Any]
Span = tuple[int, int]
MARK = "\ue2d4\ue2d5"  # from Unicode's private use area, so in no text
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)  # what a template raises for messages that it does not take

_SYSTEM, _QUESTION, _ANSWER = (MARK + name for name in ("system", "question", "answer"))
_PRELUDE = (
    "{%- set portable = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is CHANGED -%}"
    "{%- if message['content'] is string -%}{%- set portable.text = message['content'] -%}{%- else -%}"
    "{%- set portable.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ['image', 'image_url', 'text'] -%}"
    "{%- set portable.text = portable.text ~ ('' if loop.first else '\n') ~ (part['text'] if part['type'] == 'text' else IMAGE) -%}"
    "{%- else -%}{{- raise_exception('a part of content must be a text or an image, but is a ' ~ part['type']) -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set portable.messages = portable.messages + [dict(message, content=CONTENT)] -%}"
    "{%- else -%}{%- set portable.messages = portable.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = portable.messages -%}"
    "{{- '' }}"
)
# Tried in this order: strings for lists; parts for strings, if images in lists are in order; parts for both. (Strings are iterable, too.)
_STRING, _PART = "portable.text", "[{'type': 'text', 'text': portable.text}]"
_CONVERSIONS = (("iterable", _STRING), ("string", _PART), ("iterable", _PART))


def run_template(messages: list[Message], jinja: str, **settings: Any) -> tuple[str, list[Span]]:
    """Return (text, [start, end) of each `{% generation %}` block), the latter if `return_assistant_tokens_mask` is set.

    Raises DataError, with the template's own message, if it refuses the conversation.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # takes a second, which reading a file does not need

    try:
        texts, spans = render_jinja_template([messages], chat_template=jinja, **settings)
    except REFUSALS as error:
        raise DataError(f"the chat template refuses it: {error}") from error
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


@lru_cache(maxsize=8)
def adds_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts its beginning-of-sequence token before every text."""
    return tokenizer.bos_token is not None and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]


def check_prompt(tokenizer: Any, placeholder: str, medium: str = "image") -> None:
    """Raise DataError unless the tokenizer's chat template renders a question about an image, or a video, with `placeholder` once, before
    the text."""
    question = [{"role": "user", "content": [{"type": medium}, {"type": "text", "text": MARK}]}]
    text, _ = run_template(question, own_template(tokenizer), add_generation_prompt=True, **special_tokens(tokenizer))
    if text.count(placeholder) != 1 or text.count(MARK) != 1 or text.index(placeholder) > text.index(MARK):
        way = f": name another template for the model, one of {', '.join(TEMPLATES)}" if medium == "image" else ""
        raise DataError(
            f"the model's own chat template cannot ask about {'an' if medium == 'image' else 'a'} {medium}: it renders a question with one "
            f"as {text.replace(MARK, '...')!r}, which must hold {placeholder} once, before the text{way}"
        )


@lru_cache(maxsize=8)
def make_portable(jinja: str, tokenizer: Any, image: str) -> str:
    """Return a chat template that renders strings and lists of parts alike, an image as `image`, and that writes the beginning-of-sequence
    token if `tokenizer` adds one. A template that does all this, or cannot be made to, is returned unchanged.
    """
    special = special_tokens(tokenizer)
    prelude = _PRELUDE.replace("IMAGE", json.dumps(image))
    candidates = [jinja, *(prelude.replace("CHANGED", changed).replace("CONTENT", content) + jinja for changed, content in _CONVERSIONS)]
    found = next((made for made in candidates if all(_takes(made, special, image, parts) for parts in (True, False))), jinja)
    question = [{"role": "user", "content": _QUESTION}]
    if adds_bos(tokenizer) and not _text_or_nothing(question, found, special).startswith(tokenizer.bos_token):
        found = f"{{{{- {json.dumps(tokenizer.bos_token)} }}}}{found}"
    return found


def _takes(jinja: str, special: dict[str, str], image: str, parts: bool) -> bool:
    """Return whether a template renders texts and an image, given as parts or as strings, once each and in order. It may refuse or leave
    out system prompts, if it does so for strings too."""

    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if parts else text

    question = [{"type": "image"}, *content(_QUESTION)] if parts else f"{image}\n{_QUESTION}"
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": content(_ANSWER)}]
    text = _text_or_nothing(talk, jinja, special)
    if [text.count(each) for each in (image, _QUESTION, _ANSWER)] != [1, 1, 1] or "'type'" in text:
        return False
    if not text.index(image) < text.index(_QUESTION) < text.index(_ANSWER):
        return False
    systems = [_text_or_nothing([{"role": "system", "content": each}, *talk], jinja, special) for each in (_SYSTEM, content(_SYSTEM))]
    return systems[0].count(_SYSTEM) == systems[1].count(_SYSTEM) and "'type'" not in systems[1]


def _text_or_nothing(messages: list[Message], jinja: str, special: dict[str, str]) -> str:
    """Return the text of a conversation, "" if the template refuses it."""
    try:
        return run_template(messages, jinja, **special)[0]
    except DataError:
        return ""
