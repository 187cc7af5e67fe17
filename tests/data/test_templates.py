"""The text of the chat templates. test_encode.py compares the tokens with those of the original code."""

import re

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
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


def test_parts_are_on_lines_of_their_own():
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    prompt, _ = render([{"role": "user", "content": content}], chat_template("phi"), add_generation_prompt=True)
    assert prompt.endswith("questions. USER: <image>\n<image>\nCompare. ASSISTANT:")
    assert render([{"role": "user", "content": content}], chat_template("phi", "<im_start><image><im_end>"))[0].count("<im_end>") == 2


def test_a_system_message_replaces_the_default():
    messages = [{"role": "system", "content": 'Say "yes".'}, {"role": "user", "content": "Really?"}]
    assert render(messages, chat_template("v1"))[0] == '<s>Say "yes". USER: Really? ASSISTANT:'


def test_chatml_by_hand():
    """In two turns with an image, the targets are the answers and their end tokens. There is no default system prompt."""
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


BY_HAND = {
    "gemma": (
        "<bos><start_of_turn>user\nBe brief.\n\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "llama_3": (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_gemma_and_llama_3_by_hand(name, adds):
    """Contents are trimmed, as in the models' own templates. The beginning-of-sequence token comes once, whether or not the tokenizer adds
    it."""
    whole, end = BY_HAND[name]
    backend = train(size=400)
    tokens = re.findall(r"<\|?\w+\|?>", whole)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(tokens) if token != "<image>"])
    if adds:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    content = [{"type": "image"}, {"type": "text", "text": "What? "}]
    talk = [("system", "Be brief."), ("user", content), ("assistant", " A cat.\n"), ("user", "Sure?")]
    messages = [{"role": role, "content": text} for role, text in talk]
    rendered = tokenizer.apply_chat_template(messages, chat_template=chat_template(name), add_generation_prompt=True, tokenize=False)
    assert rendered == whole
    messages[1]["content"] = "<image>\nWhat? "
    encoded = encode_record({"messages": [*messages, {"role": "assistant", "content": "Yes."}], "image": "a.png"}, tokenizer, name)
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (whole + "Yes." + end).split("<image>"))
    line = tokenizer.encode("\n", add_special_tokens=False) if name == "gemma" else []
    assert encoded["input_ids"] == [*first, -200, *second, *line]
    learnt = [token for token in encoded["labels"] if token >= 0]
    assert learnt == [
        *tokenizer.encode(f"A cat.{end}", add_special_tokens=False),
        *tokenizer.encode(f"Yes.{end}", add_special_tokens=False),
    ]
