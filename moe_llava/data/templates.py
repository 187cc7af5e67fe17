"""The chat templates of the published models, as data.

    A chat between ... questions. USER: <image>
    What is this? ASSISTANT: A cat.<|endoftext|>USER: Sure? ASSISTANT: Yes.<|endoftext|>

Most of them render this; they differ in what ends an answer, and in whether a beginning-of-sequence token comes first. "llama_2", "llama_3"
and "gemma" are those of Llama 2, of Llama 3, and of Gemma 1 to 3. "chatml" is that of many newer models, without a default system prompt,
because some tokenizers' own cannot be rendered turn by turn. "plain", for stage I, is an image and its caption.
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

# In the templates below, words in capitals are replaced by `chat_template`.
# The content of a message is a string, or parts, each on a line of its own, with a placeholder for an image.
_TEXT = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
    "{{- IMAGE if part['type'] == 'image' else part['text'] -}}{%- if not loop.last -%}{{- '\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
_SYSTEM_PROMPT = "{%- set system = text(messages[0]['content']) if messages[0]['role'] == 'system' else SYSTEM -%}"
_WITHOUT_SYSTEM = "{%- set messages = messages | selectattr('role', 'in', ['user', 'assistant']) | list -%}"


def _each_message(question: str, answer: str, after: str = "''") -> str:
    """Return a loop over messages that renders the Jinja expression `question` for each, but for answers `answer`, which is marked, and
    then `after`. `content` in them is the text of the message. As in the original code, nothing is rendered for an empty answer.

    The space before an answer belongs in `answer`, because most tokenizers join it to the first word.
    """
    return (
        "{%- for message in messages -%}{%- set content = text(message['content']) -%}"
        f"{{%- if message['role'] != 'assistant' -%}}{{{{- {question} -}}}}"
        f"{{%- elif content -%}}{{%- generation -%}}{{{{- {answer} -}}}}{{%- endgeneration -%}}{{{{- {after} -}}}}{{%- endif -%}}"
        "{%- endfor -%}"
    )


_USER_AND_ASSISTANT = f"{_TEXT}{{{{- BOS -}}}}{_SYSTEM_PROMPT}{_WITHOUT_SYSTEM}{{{{- system + ' ' -}}}}" + _each_message(
    "'USER: ' + content + ' ASSISTANT:'", "' ' + content + END"
)
_LLAMA_2 = f"{_TEXT}{{{{- BOS -}}}}{_SYSTEM_PROMPT}{_WITHOUT_SYSTEM}" + _each_message(
    "('[INST] <<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first else '<s>[INST] ') + content + ' [/INST]'", "' ' + content + END"
)
_PLAIN = _TEXT + (
    "{{- IMAGE -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- text(message['content']) + END -}}{%- endgeneration -%}"
    "{%- endif -%}{%- endfor -%}"
)
# Gemma 3 puts a system prompt before the first question. Gemma 1 and 2 refuse one, and render the rest in the same way.
_GEMMA = (
    f"{_TEXT}{{{{- BOS -}}}}"
    "{%- set system = text(messages[0]['content']) + '\n\n' if messages[0]['role'] == 'system' else '' -%}"
    + _WITHOUT_SYSTEM
    + _each_message(
        "'<start_of_turn>user\n' + (system if loop.first else '') + content | trim + END + '\n<start_of_turn>model\n'",
        "content | trim + END",
        "'\n'",
    )
)
_LLAMA_3 = f"{_TEXT}{{{{- BOS -}}}}" + _each_message(
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + content | trim + END"
    " + ('<|start_header_id|>assistant<|end_header_id|>\n\n' if message['role'] == 'user' else '')",
    "content | trim + END",
)
_CHATML = _TEXT + _each_message(
    "'<|im_start|>' + message['role'] + '\n' + content + END + '\n' + ('<|im_start|>assistant\n' if message['role'] == 'user' else '')",
    "content + END",
    "'\n'",
)


@dataclass(frozen=True)
class Template:
    """`end`: what ends an answer. `bos`: whether the tokenizer's beginning-of-sequence token comes first. `system`: the default system
    prompt."""

    end: str
    bos: bool = False
    system: str = SYSTEM
    jinja: str = _USER_AND_ASSISTANT


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
    """Return a template of TEMPLATES in Jinja, for tokenizers and processors. `image` is the placeholder of an image."""
    template = TEMPLATES[name]
    text = template.jinja.replace("BOS", "bos_token" if template.bos else "''")
    for key, value in {"IMAGE": image, "SYSTEM": template.system, "END": template.end}.items():
        text = text.replace(key, json.dumps(value, ensure_ascii=False))
    return text
