"""The conversation forms of the published models, as data, and as chat templates.

    A chat between ... questions. USER: <image>
    What is this? ASSISTANT: A cat.<|endoftext|>USER: Sure? ASSISTANT: Yes.<|endoftext|>

All of them read so; they differ in what ends an answer, and in whether the beginning-of-sequence token comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_llava.data.records import IMAGE_TOKEN

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """`end`: what ends an answer. `bos`: whether the tokenizer's beginning-of-sequence token comes first."""

    end: str
    bos: bool = False


TEMPLATES = {
    "phi": Template("<|endoftext|>"),
    "stablelm": Template("<|endoftext|>"),
    "qwen": Template("<|endoftext|>"),
    "openchat": Template("<|end_of_turn|>", bos=True),
    "mistral": Template("</s>", bos=True),
    "v1": Template("</s>", bos=True),
}

# A message is a string, or parts; parts stand on lines of their own, an image as its placeholder. What a model learns to say is marked:
# the space before an answer belongs to it, because most tokenizers join it to the first word. An empty answer is none: the original
# code writes neither the space nor the end.
_JINJA = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
    "{{- IMAGE if part['type'] == 'image' else part['text'] -}}{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- BOS -}}"
    "{%- if messages[0]['role'] == 'system' -%}{{- text(messages[0]['content']) -}}{%- else -%}{{- SYSTEM -}}{%- endif -%}{{- ' ' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + text(message['content']) + ' ASSISTANT:' -}}"
    "{%- elif message['role'] == 'assistant' and text(message['content']) -%}"
    "{%- generation -%}{{- ' ' + text(message['content']) + END -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def chat_template(name: str, image: str = IMAGE_TOKEN) -> str:
    """The Jinja template of a conversation form, for tokenizers and processors; `image` is what stands for an image."""
    template = TEMPLATES[name]
    values = {"IMAGE": _quote(image), "SYSTEM": _quote(SYSTEM), "END": _quote(template.end), "BOS": "bos_token" if template.bos else "''"}
    text = _JINJA
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
