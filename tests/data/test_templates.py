"""The chat templates write what the original code wrote, recorded prompt by prompt."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moe_llava.data.templates import TEMPLATES, chat_template

ROLES = {"human": "user", "gpt": "assistant"}


def render(messages, template, add_generation_prompt=False):
    prompts, spans = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=True,
        bos_token="<s>",
    )
    return prompts[0], [prompts[0][start:end] for start, end in spans[0]]


@pytest.mark.parametrize(("name", "tokenizer"), [("phi", "bytebpe"), ("v1", "llama_fast")])
def test_prompts_and_what_is_learnt_equal_the_recorded(golden, name, tokenizer):
    recorded = json.loads((golden / "labels" / f"{name}__{tokenizer}.json").read_text())
    compared = 0
    for result in recorded["results"]:
        if result["status"] != "ok" or len(result["input_ids"]) >= recorded["model_max_length"]:
            continue  # the original failed, or cut the record
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in result["conversations_after_multimodal"]]
        if messages[0]["role"] == "assistant":
            messages = messages[1:]  # as the original code does
        prompt, learnt = render(messages, chat_template(name))
        begin = "<s>" if TEMPLATES[name].bos else ""
        assert prompt == begin + result["prompt"], result["record"]
        if "<image>" not in "".join(learnt):  # the record shows another token in its place
            # A llama tokenizer loses the first space when it decodes.
            assert [text.lstrip(" ") for text in learnt] == [text.lstrip(" ") for text in result["supervised_text"]], result["record"]
        compared += 1
    assert compared >= 10


def test_parts_stand_on_lines_of_their_own():
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    prompt, _ = render([{"role": "user", "content": content}], chat_template("phi"), add_generation_prompt=True)
    assert prompt.endswith("questions. USER: <image>\n<image>\nCompare. ASSISTANT:")
    assert render([{"role": "user", "content": content}], chat_template("phi", "<im_start><image><im_end>"))[0].count("<im_end>") == 2


def test_a_system_message_takes_the_place_of_the_default():
    messages = [{"role": "system", "content": 'Say "yes".'}, {"role": "user", "content": "Really?"}]
    assert render(messages, chat_template("v1"))[0] == '<s>Say "yes". USER: Really? ASSISTANT:'
