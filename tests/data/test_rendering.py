"""Chat templates as language models come with them: one text for training, chat, server and Python, and labels that end with the turn."""

import json

import pytest
from jinja2 import TemplateError
from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from moe_llava.common.errors import DataError
from moe_llava.data.answers import placeholder, render
from moe_llava.data.encode import encode_record
from moe_llava.data.rendering import check_prompt, make_portable
from tests.checkpoints.tiny_tokenizers import train
from tests.data.chat_templates import EOS, GEMMA_2, QWEN_2_5, REFUSES_SYSTEM, TEMPLATES

TALK = [("human", "<image>\nWhat is it?"), ("gpt", "A cat. It says: yes"), ("human", "Sure?"), ("gpt", "yes")]


def tokenizer_of(template, tokens=(), **names):
    backend = train(size=300)
    backend.add_special_tokens([EOS, "<bos>", "<image>", *tokens])
    names = {"bos_token": "<bos>", "eos_token": EOS, "pad_token": EOS} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, extra_special_tokens={"image_token": "<image>"}, chat_template=template
    )


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request):
    """(name, tokenizer with the template as processors get it, what ends an answer)"""
    template, tokens, end = TEMPLATES[request.param]
    tokenizer = tokenizer_of(template, tokens)
    tokenizer.chat_template = make_portable(template, tokenizer, "<image>")
    return request.param, tokenizer, end


def learnt(encoded, tokenizer):
    texts, run = [], []
    for label in [*encoded["labels"], -100]:
        if label == -100:
            texts += [tokenizer.decode(run)] if run else []
            run = []
        else:
            run.append(label)
    return texts


def record(*turns, **keys):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **keys}


def parts(text):
    image, _, rest = text.rpartition("<image>\n")
    return [{"type": "image"}] * bool(image or rest != text) + [{"type": "text", "text": rest}]


def test_targets_are_answers_with_their_ends(model):
    _, tokenizer, end = model
    encoded = encode_record(record(*TALK, image="a.png"), tokenizer)
    assert learnt(encoded, tokenizer) == ["A cat. It says: yes" + end, "yes" + end]
    assert encoded["input_ids"].count(-200) == 1
    assert encoded["input_ids"].count(tokenizer.bos_token_id) <= 1


def test_prompts_are_prefixes_of_the_training_text(model):
    """This holds for strings and parts, and for tokenizer and processor."""
    _, tokenizer, _ = model
    roles = {"human": "user", "gpt": "assistant"}
    strings = [{"role": roles[role], "content": text} for role, text in TALK]
    lists = [{"role": roles[role], "content": parts(text)} for role, text in TALK]
    text, _ = render(strings, tokenizer, None, placeholder(tokenizer, None))
    processor = LlavaProcessor(LlavaImageProcessorPil(), tokenizer, chat_template=tokenizer.chat_template)
    for turns in (1, 3):
        for messages in (lists, strings):
            prompt = processor.apply_chat_template(messages[:turns], add_generation_prompt=True)
            assert prompt.count("<image>") == 1
            assert prompt.index("<image>") < prompt.index("What is it?")
            assert messages is strings or text.startswith(prompt)
            assert "".join(text.split()).startswith("".join(prompt.split()))
    check_prompt(tokenizer, "<image>")


def test_an_empty_answer_is_no_target(model):
    _, tokenizer, end = model
    talk = [TALK[0], ("gpt", ""), *TALK[2:]]
    assert learnt(encode_record(record(*talk, image="a.png"), tokenizer), tokenizer) == ["yes" + end]


def test_white_space_and_the_words_of_the_template_in_an_answer(model):
    _, tokenizer, end = model
    said = f"  {end.strip()} or ASSISTANT: assistant\n"
    (text,) = learnt(encode_record(record(("human", "Why?"), ("gpt", said)), tokenizer), tokenizer)
    assert text.strip().startswith(f"{end.strip()} or ASSISTANT: assistant".strip())
    assert text.endswith(end)
    assert text.count(end.strip()) == (2 if end.strip() else len(text) + 1)


def test_an_image_that_is_text(model):
    """In a record without an image, the placeholder is encoded as characters, not as the model's own token."""
    _, tokenizer, _ = model
    encoded = encode_record(record(("human", "Is <image> HTML?"), ("gpt", "<image> is not.")), tokenizer)
    assert -200 not in encoded["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<image>") not in encoded["input_ids"]
    assert "Is <image> HTML?" in tokenizer.decode(encoded["input_ids"])
    assert "<image> is not." in learnt(encoded, tokenizer)[0]


def test_a_system_prompt_is_written_or_refused_by_name(model):
    name, tokenizer, _ = model
    spoken = record(("system", "Be brief."), *TALK, image="a.png")
    if name in REFUSES_SYSTEM:
        with pytest.raises(DataError, match=f"the chat template refuses it: {REFUSES_SYSTEM[name]}"):
            encode_record(spoken, tokenizer)
        with pytest.raises(TemplateError, match=REFUSES_SYSTEM[name]):
            tokenizer.apply_chat_template([{"role": "system", "content": parts("Be brief.")}, {"role": "user", "content": "x"}])
    else:
        assert "Be brief." in tokenizer.decode([token for token in encode_record(spoken, tokenizer)["input_ids"] if token >= 0])


def test_a_portable_template_stays_as_it_is(model):
    _, tokenizer, _ = model
    assert make_portable(tokenizer.chat_template, tokenizer, "<image>") == tokenizer.chat_template


def test_a_content_part_that_no_template_takes_is_refused():
    tokenizer = tokenizer_of(QWEN_2_5, ("<|im_start|>", "<|im_end|>"))
    jinja = make_portable(QWEN_2_5, tokenizer, "<image>")
    with pytest.raises(TemplateError, match="must be a text or an image, but is a video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], chat_template=jinja, tokenize=False)
    asked = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "<|im_start|>user\nx<|im_end|>" in tokenizer.apply_chat_template(
        [asked, called], chat_template=jinja, tools=tools, tokenize=False
    )


@pytest.mark.parametrize("template", [QWEN_2_5, GEMMA_2])
@pytest.mark.parametrize("adds", [False, True])
def test_the_beginning_of_sequence_token_comes_once(template, adds):
    """The tokenizer, the template, or both may write it: training and the README's Python agree."""
    tokenizer = tokenizer_of(template, ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"))
    if adds:
        from tokenizers.processors import TemplateProcessing

        single = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = single
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    tokenizer.chat_template = make_portable(template, tokenizer, "<image>")
    begins = int(adds or template == GEMMA_2)
    trained = encode_record(record(("human", "Why?"), ("gpt", "So.")), tokenizer)["input_ids"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts("Why?")}], add_generation_prompt=True, tokenize=False)
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained[: len(asked)] == asked
    assert asked.count(tokenizer.bos_token_id) == trained.count(tokenizer.bos_token_id) == begins


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "cannot ask about an image"),
        ("<image>{% for message in messages %}{{ message['content'][-1]['text'] }}<image>{% endfor %}", "cannot ask about an image"),
        ("{% for message in messages %}{{ message['content'][-1]['text'] }}<image>{% endfor %}", "before the text"),
        ("{{ messages[2]['content'] + 1 }}", "the chat template refuses it"),
        ("{{ raise_exception('never') }}", "refuses it: never"),
        ("{% if %}", "refuses it"),
        ("", "has no chat template"),
    ],
)
def test_a_template_that_cannot_render_a_question_is_refused(template, message):
    tokenizer = tokenizer_of(template)
    with pytest.raises(DataError, match=message):
        check_prompt(tokenizer, "<image>")


def test_the_default_of_several_templates_is_used():
    several = {"default": QWEN_2_5, "tool_use": "{{ tools }}"}
    one, many = (tokenizer_of(jinja, ("<|im_start|>", "<|im_end|>")) for jinja in (QWEN_2_5, several))
    talk = record(("human", "Why?"), ("gpt", "So."))
    assert encode_record(talk, many) == encode_record(talk, one)


def test_an_answer_that_the_template_changes_is_a_problem_of_its_record():
    jinja = QWEN_2_5.replace("message.content + '<|im_end|>'", "message.content.split('</think>')[-1] + '<|im_end|>'")
    tokenizer = tokenizer_of(jinja, ("<|im_start|>", "<|im_end|>"))
    assert learnt(encode_record(record(("human", "Why?"), ("gpt", "So.")), tokenizer), tokenizer) == ["So.<|im_end|>"]
    with pytest.raises(DataError, match="does not add turn to turn"):
        encode_record(record(("human", "Why?"), ("gpt", "<think>Hm.</think>So.")), tokenizer)


def test_a_saved_portable_template_renders_the_same_text(tmp_path):
    tokenizer = tokenizer_of(QWEN_2_5, ("<|im_start|>", "<|im_end|>"))
    jinja = make_portable(QWEN_2_5, tokenizer, "<image>")
    for text in ("Why?", "<image>\nWhat?"):
        turns = [{"role": "system", "content": " Be. "}, {"role": "user", "content": text}]
        plain, made = (tokenizer.apply_chat_template(turns, chat_template=each, tokenize=False) for each in (QWEN_2_5, jinja))
        assert made == plain
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == jinja
    assert json.dumps("<image>") in jinja
