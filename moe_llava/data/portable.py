"""Make a chat template take every form of content: a string, or a list of parts with images among them.

Chat templates of text models add `message['content']` to a string, and fail on the parts that transformers, vLLM and clients send. Others
iterate over parts, and lose a string, or write a placeholder of their own for an image. Such a template gets a few lines before it, which
bring the messages into the form that it takes. All that it does with them stays its own.
"""

from __future__ import annotations

import json
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.data.rendering import MARK, Message, adds_beginning, rendered, special_tokens

_SYSTEM, _ASKED, _ANSWERED = (MARK + name for name in ("system", "asked", "answered"))
_TEXT = (
    "{%- if message['content'] is string -%}{%- set portable.text = message['content'] -%}{%- else -%}"
    "{%- set portable.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ['image', 'image_url', 'text'] -%}"
    "{%- set portable.text = portable.text ~ ('' if loop.first else '\n') ~ (part['text'] if part['type'] == 'text' else IMAGE) -%}"
    "{%- else -%}{{- raise_exception('a part of content must be a text or an image, but is a ' ~ part['type']) -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
_PRELUDE = (
    "{%- set portable = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is CHANGED -%}"
    + _TEXT
    + "{%- set portable.messages = portable.messages + [dict(message, content=CONTENT)] -%}"
    "{%- else -%}{%- set portable.messages = portable.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = portable.messages -%}"
)
_STRING, _PART = "portable.text", "[{'type': 'text', 'text': portable.text}]"


def portable(jinja: str, tokenizer: Any, image: str) -> str:
    """Return a chat template that renders strings and lists of parts alike, an image as `image`, and that writes the beginning-of-sequence
    token if `tokenizer` adds one. A template that does all this, or cannot be made to, is returned as it is.
    """
    special = special_tokens(tokenizer)
    if _takes(jinja, special, image, parts=True) and _takes(jinja, special, image, parts=False):
        found = jinja
    else:
        prelude = _PRELUDE.replace("IMAGE", json.dumps(image))
        lists = "iterable"  # strings are, too
        # Strings for lists; parts for strings, where images in lists are in order; parts for both.
        ways = [(lists, _STRING), ("string", _PART), (lists, _PART)]
        tried = (prelude.replace("CHANGED", changed).replace("CONTENT", content) + "{{- '' }}" + jinja for changed, content in ways)
        both = (True, False)
        found = next((made for made in tried if all(_takes(made, special, image, parts) for parts in both)), jinja)
    if adds_beginning(tokenizer) and not _said([_user(_ASKED)], found, special).startswith(tokenizer.bos_token):
        found = f"{{{{- {json.dumps(tokenizer.bos_token)} }}}}{found}"
    return found


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _takes(jinja: str, special: dict[str, str], image: str, parts: bool) -> bool:
    """Whether texts and an image come out once each and in order, of parts or of strings. System prompts may be refused or left out, if
    strings are, too."""

    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if parts else text

    question = [{"type": "image"}, *content(_ASKED)] if parts else f"{image}\n{_ASKED}"
    talk = [_user(question), {"role": "assistant", "content": content(_ANSWERED)}]
    text = _said(talk, jinja, special)
    if [text.count(each) for each in (image, _ASKED, _ANSWERED)] != [1, 1, 1] or "'type'" in text:
        return False
    if not text.index(image) < text.index(_ASKED) < text.index(_ANSWERED):
        return False
    systems = [_said([{"role": "system", "content": each}, *talk], jinja, special) for each in (_SYSTEM, content(_SYSTEM))]
    return systems[0].count(_SYSTEM) == systems[1].count(_SYSTEM) and "'type'" not in systems[1]


def _said(messages: list[Message], jinja: str, special: dict[str, str]) -> str:
    """The text of a conversation, "" if the template refuses it."""
    try:
        return rendered(messages, jinja, **special)[0]
    except DataError:
        return ""
