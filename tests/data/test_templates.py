"""What the chat templates render. That it is what the original code made of records, test_encode.py compares, token by token."""

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from moe_llava.data.encode import encode_record
from moe_llava.data.templates import chat_template
from tests.checkpoints.tiny_tokenizers import train


def render(messages, template, add_generation_prompt=False):
    prompts, spans = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=True,
        bos_token="<s>",
    )
    return prompts[0], [prompts[0][start:end] for start, end in spans[0]]


def test_parts_stand_on_lines_of_their_own():
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    prompt, _ = render([{"role": "user", "content": content}], chat_template("phi"), add_generation_prompt=True)
    assert prompt.endswith("questions. USER: <image>\n<image>\nCompare. ASSISTANT:")
    assert render([{"role": "user", "content": content}], chat_template("phi", "<im_start><image><im_end>"))[0].count("<im_end>") == 2


def test_a_system_message_takes_the_place_of_the_default():
    messages = [{"role": "system", "content": 'Say "yes".'}, {"role": "user", "content": "Really?"}]
    assert render(messages, chat_template("v1"))[0] == '<s>Say "yes". USER: Really? ASSISTANT:'


def test_chatml_by_hand():
    """Two turns and an image: what is learnt is the answers and the token that ends them. No system prompt, unless there is one."""
    backend = train(size=400)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")]
    record = {"image": "a.png", "conversations": [{"from": role, "value": text} for role, text in turns]}
    encoded = encode_record(record, tokenizer, "chatml", image_tokens=2)
    pieces = [
        ("<|im_start|>user\n", False),
        (None, False),
        ("\nWhat?<|im_end|>\n<|im_start|>assistant\n", False),
        ("A cat.<|im_end|>", True),
        ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
        ("\n", False),
    ]
    ids, labels = [], []
    for text, learnt in pieces:
        piece = [-200, -200] if text is None else tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if learnt else [-100] * len(piece)
    assert encoded == {"input_ids": ids, "labels": labels}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert render(messages, chat_template("chatml"), add_generation_prompt=True) == (expected, [])
