"""The conversation forms of the published models, as data, and as chat templates.

    A chat between ... questions. USER: <image>
    What is this? ASSISTANT: A cat.<|endoftext|>USER: Sure? ASSISTANT: Yes.<|endoftext|>

Most of them read so; they differ in what ends an answer, and in whether the beginning-of-sequence token comes first. "llama_2" is Llama
2's own form, "llama_3" and "gemma" are those of Llama 3 and of Gemma 1 to 3; "chatml" is that of many models since, here without a default
system prompt, because some tokenizers' own template cannot be built turn by turn; "plain", of stage I, is an image and its caption.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from moe_llava.data.records import IMAGE_TOKEN

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)

# A message is a string, or parts; parts stand on lines of their own, an image as its placeholder. What a model learns to say is marked:
# the space before an answer belongs to it, because most tokenizers join it to the first word. An empty answer is none: the original
# code writes neither the space nor the end.
_TEXT = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
    "{{- IMAGE if part['type'] == 'image' else part['text'] -}}{%- if not loop.last -%}{{- '\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
_TWO = _TEXT + (
    "{{- BOS -}}"
    "{%- if messages[0]['role'] == 'system' -%}{{- text(messages[0]['content']) -}}{%- else -%}{{- SYSTEM -}}{%- endif -%}{{- ' ' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + text(message['content']) + ' ASSISTANT:' -}}"
    "{%- elif message['role'] == 'assistant' and text(message['content']) -%}"
    "{%- generation -%}{{- ' ' + text(message['content']) + END -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
_LLAMA_2 = _TEXT + (
    "{{- BOS -}}"
    "{%- set system = text(messages[0]['content']) if messages[0]['role'] == 'system' else SYSTEM -%}"
    "{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if not loop.first -%}{{- '<s>' -}}{%- endif -%}{{- '[INST] ' -}}"
    "{%- if loop.first -%}{{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' -}}{%- endif -%}"
    "{{- text(message['content']) + ' [/INST]' -}}"
    "{%- elif text(message['content']) -%}"
    "{%- generation -%}{{- ' ' + text(message['content']) + END -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
_PLAIN = _TEXT + (
    "{{- IMAGE -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- text(message['content']) + END -}}{%- endgeneration -%}"
    "{%- endif -%}{%- endfor -%}"
)
# Gemma 3's: Gemma 1 and 2 write the same, and refuse a system prompt, which Gemma 3 puts before the first question.
_GEMMA = _TEXT + (
    "{{- BOS -}}"
    "{%- set system = text(messages[0]['content']) + '\n\n' if messages[0]['role'] == 'system' else '' -%}"
    "{%- for message in messages | rejectattr('role', 'equalto', 'system') -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<start_of_turn>user\n' + (system if loop.first else '') + text(message['content']) | trim + END + '\n' -}}"
    "{{- '<start_of_turn>model\n' -}}"
    "{%- elif text(message['content']) -%}"
    "{%- generation -%}{{- text(message['content']) | trim + END -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
_LLAMA_3 = _TEXT + (
    "{{- BOS -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] != 'assistant' -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + text(message['content']) | trim + END -}}"
    "{%- if message['role'] == 'user' -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
    "{%- elif text(message['content']) -%}"
    "{%- generation -%}{{- text(message['content']) | trim + END -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
_CHATML = _TEXT + (
    "{%- for message in messages -%}"
    "{%- if message['role'] != 'assistant' -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + text(message['content']) + END + '\n' -}}"
    "{%- if message['role'] == 'user' -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    "{%- elif text(message['content']) -%}"
    "{%- generation -%}{{- text(message['content']) + END -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Template:
    """`end`: what ends an answer. `bos`: whether the tokenizer's beginning-of-sequence token comes first."""

    end: str
    bos: bool = False
    system: str = SYSTEM
    jinja: str = _TWO


TEMPLATES = {
    "phi": Template("<|endoftext|>"),
    "stablelm": Template("<|endoftext|>"),
    "qwen": Template("<|endoftext|>"),
    "openchat": Template("<|end_of_turn|>", bos=True),
    "mistral": Template("</s>", bos=True),
    "minicpm": Template("</s>", bos=True),
    "v1": Template("</s>", bos=True),
    "llama_2": Template(" </s>", bos=True, system=LLAMA_2_SYSTEM, jinja=_LLAMA_2),
    "llama_3": Template("<|eot_id|>", bos=True, jinja=_LLAMA_3),
    "gemma": Template("<end_of_turn>", bos=True, jinja=_GEMMA),
    "chatml": Template("<|im_end|>", jinja=_CHATML),
    "plain": Template("\n", jinja=_PLAIN),
}


def chat_template(name: str, image: str = IMAGE_TOKEN) -> str:
    """The Jinja template of a conversation form, for tokenizers and processors; `image` is what stands for an image."""
    template = TEMPLATES[name]
    values = {"IMAGE": image, "SYSTEM": template.system, "END": template.end}
    text = template.jinja.replace("BOS", "bos_token" if template.bos else "''")
    for key, value in values.items():
        text = text.replace(key, _quote(value))
    return text


def _quote(text: str) -> str:
    """A Jinja string."""
    return json.dumps(text, ensure_ascii=False)
