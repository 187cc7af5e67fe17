"""Run chat templates, which are programs of somebody else: they may refuse a conversation, or fail on it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from moe_llava.common.errors import DataError
from moe_llava.data.templates import TEMPLATES

Message = dict[str, Any]
Span = tuple[int, int]
MARK = "\ue2d4\ue2d5"  # of Unicode's private use, so in no text
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)  # what running a template raises: an error of its input


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
