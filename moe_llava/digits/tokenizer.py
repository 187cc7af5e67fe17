"""A word-level tokenizer for the digits world, and its chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_llava.digits.questions import vocabulary
from moe_llava.digits.scenes import STANDARD, Level

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "user:", "assistant:"

# The chat template of LLaVA-1.5 (v1), without a default system prompt. The generation block marks the labels.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} ASSISTANT:"
    "{% elif message['role'] == 'system' %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ' }}"
    "{% else %}{{ ' ' }}{% generation %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def build_tokenizer(level: Level = STANDARD) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a level. It lower-cases text and splits it at white space and around "?", "." and ","; unknown words become
    `<unk>`."""
    words = [PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT, *vocabulary(level)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.,]"), "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",  # for batched generation; training has its own padding
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
