"""Token ids and labels equal those of the original code for the same records, and are right where it failed."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from moe_llava.common.errors import DataError
from moe_llava.data.encode import encode_record

RECORDED = ["phi__bytebpe", "v1__llama_fast", "plain__bytebpe"]


@pytest.fixture
def load(golden):
    """name -> (tokenizer, records by id, recorded results)"""
    records = {record["id"]: record for record in json.loads((golden / "labels" / "records.json").read_text())}

    def load(name):
        recorded = json.loads((golden / "labels" / f"{name}.json").read_text())
        return PreTrainedTokenizerFast.from_pretrained(golden / "tokenizers" / recorded["tokenizer"]), records, recorded["results"]

    return load


@pytest.mark.parametrize("name", RECORDED)
def test_ids_and_labels_equal_the_recorded(load, name):
    tokenizer, records, results = load(name)
    compared = 0
    for result in results:
        if result["status"] == "ok":
            encoded = encode_record(records[result["record"]], tokenizer, template=name.split("__")[0])
            assert encoded["input_ids"] == result["input_ids"], result["record"]
            assert encoded["labels"] == result["labels"], result["record"]
            compared += 1
    assert compared >= 15


def learnt(encoded, tokenizer):
    """Return the text of each run of targets."""
    texts, run = [], []
    for label in [*encoded["labels"], -100]:
        if label == -100:
            texts += [tokenizer.decode(run)] if run else []
            run = []
        else:
            run.append(label)
    return texts


def conversation(*texts, image=True):
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"conversations": turns} | ({"image": "a.png"} if image else {})


@pytest.fixture
def byte_level(load):
    return load("phi__bytebpe")[0]


@pytest.mark.parametrize("name", ["phi__bytebpe", "v1__llama_fast"])
def test_where_the_original_failed(load, name):
    """The targets are every answer with its end, whatever it contains, and nothing else."""
    tokenizer, records, results = load(name)
    template = name.split("__")[0]
    end = "<|endoftext|>" if template == "phi" else "</s>"
    right = {
        "empty_answer": [],
        "role_string_in_answer": [f"USER: hi ASSISTANT: hello{end}"],
        "eos_text_in_answer": [f"With </s> or <|endoftext|> or <|end_of_turn|> tokens.{end}"],
        "no_answer_turn": [f"A lake.{end}"],
    }
    failed = {result["record"] for result in results if result["status"] != "ok"}
    assert failed == {*right, "bad_role_order"}
    for record, texts in right.items():
        found = learnt(encode_record(records[record], tokenizer, template), tokenizer)
        assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in texts], record
    with pytest.raises(DataError, match="turn 1 is by the user, but user and assistant must take turns, user first"):
        encode_record(records["bad_role_order"], tokenizer, template)


def test_an_end_of_text_that_is_also_padding_is_a_target(byte_level):
    byte_level.pad_token = byte_level.eos_token
    assert encode_record(conversation("<image>\nWhat?", "A cat."), byte_level, "phi")["labels"][-1] == byte_level.eos_token_id


def test_an_image_in_an_answer_splits_the_targets(byte_level):
    encoded = encode_record(conversation("<image>\nWhere?", "Here: <image> done."), byte_level, "phi", image_tokens=3)
    assert encoded["input_ids"].count(-200) == 6
    assert encoded["labels"].count(-200) == 3
    assert encoded["labels"][-1] == byte_level.eos_token_id


def test_long_records(byte_level):
    """Text is cut at the limit; a record with images is not, because its images could be cut."""
    byte_level.model_max_length = 60
    text = encode_record(conversation("Why?", "because " * 100, image=False), byte_level, "phi")
    assert len(text["input_ids"]) == len(text["labels"]) == 60
    assert len(encode_record(conversation("<image>\nWhy?", "because " * 100), byte_level, "phi")["input_ids"]) > 60


def test_image_tokens(byte_level):
    one = encode_record(conversation("<image>\nWhat?", "A cat."), byte_level, "phi")
    many = encode_record(conversation("<image>\nWhat?", "A cat."), byte_level, "phi", image_tokens=5)
    assert many["input_ids"].count(-200) == 5
    assert [token for token in many["input_ids"] if token != -200] == [token for token in one["input_ids"] if token != -200]
    assert len(many["labels"]) == len(many["input_ids"])


def test_other_templates(load, byte_level):
    llama = load("v1__llama_fast")[0]
    record = conversation("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    for template, end in (("stablelm", "<|endoftext|>"), ("qwen", "<|endoftext|>")):
        assert learnt(encode_record(record, byte_level, template), byte_level) == [f" A cat.{end}", f" Yes.{end}"]
    for template, end in (("openchat", "<|end_of_turn|>"), ("mistral", "</s>"), ("minicpm", "</s>"), ("llama_2", " </s>")):
        encoded = encode_record(record, llama, template)
        assert [text.strip() for text in learnt(encoded, llama)] == [f"A cat.{end}", f"Yes.{end}"]
        assert encoded["input_ids"].count(llama.bos_token_id) == (2 if template == "llama_2" else 1)
    text = llama.decode([token for token in encoded["input_ids"] if token != -200])
    assert text.startswith("<s> [INST] <<SYS>>\nYou are a helpful") or text.startswith("<s>[INST] <<SYS>>\nYou are a helpful")
    caption = encode_record(conversation("Describe.\n<image>", "a cat"), llama, "plain")
    assert caption["input_ids"][:2] == [llama.bos_token_id, -200]
    assert caption["labels"][:2] == [-100, -100]
    assert caption["labels"][2:] == caption["input_ids"][2:]
    with pytest.raises(DataError, match="the template 'plain' takes one question"):
        encode_record(record, byte_level, "plain")


MODERN = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_language_models_own_template(byte_level):
    """Without generation blocks, an answer is what a turn adds to the prompt for it."""
    byte_level.chat_template = MODERN
    encoded = encode_record(conversation("<image>\nWhat?", "A cat.", "Sure?", "Yes."), byte_level)
    assert learnt(encoded, byte_level) == ["A cat.<|im_end|>", "Yes.<|im_end|>"]
    assert encoded["input_ids"].count(byte_level.bos_token_id) == 1
    byte_level.chat_template = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="does not add turn to turn"):
        encode_record(conversation("What?", "A cat.", "Sure?", "Yes."), byte_level)


def test_both_schemas(byte_level):
    expected = encode_record(conversation("<image>\nWhat?", "A cat."), byte_level, "phi")
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    for content in ("<image>\nWhat?", parts):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
        assert encode_record({"messages": messages, "images": ["a.png"]}, byte_level, "phi") == expected
    with pytest.raises(DataError, match="neither 'conversations' nor 'messages'"):
        encode_record({"id": 1}, byte_level, "phi")
    with pytest.raises(DataError, match="turn 0 must be a text from one of human, gpt"):
        encode_record({"conversations": [{"from": "user", "value": "x"}]}, byte_level, "phi")
    with pytest.raises(DataError, match="turn 0 must be a text from one of human, gpt, but is hello"):
        encode_record({"conversations": ["hello"]}, byte_level, "phi")
