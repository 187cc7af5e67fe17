"""Copies of a tokenizer share its vocabulary; a start parses a tokenizer once."""

import json
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_llava.checkpoints.load import load_processor
from moe_llava.data.backends import copy_tokenizer, report_spaces, share_vocabulary
from moe_llava.serving.engine.engine import Engine
from tests.conftest import tiny_dense
from tests.training.conftest import tiny_base  # noqa: F401

PARSES = ("from_file", "from_str", "from_buffer", "to_str", "__setstate__")


@pytest.fixture
def tokenizer():
    """Byte-level, with an added token in its vocabulary and two outside."""
    words = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {"he": 256, "ll": 257, "Ġa": 258, "<in>": 259}
    backend = Tokenizer(models.BPE(words, [("h", "e"), ("l", "l"), ("Ġ", "a")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens(["<in>", "<image>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def test_a_copy_is_the_same_tokenizer_but_for_settings_of_its_own(tokenizer):
    copied = copy_tokenizer(tokenizer)
    assert copied.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    text = "hello a <image></s><in>"
    assert copied(text)["input_ids"] == tokenizer(text)["input_ids"]
    copied("hello a", truncation=True, max_length=2)
    assert copied.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.truncation is None


def test_renamed_tokens_keep_their_ids_and_white_space_is_reported(tokenizer):
    backend = tokenizer.backend_tokenizer
    shared = share_vocabulary(backend, {"<image>": "#<image>"})
    report_spaces(shared)
    assert shared.token_to_id("#<image>") == backend.token_to_id("<image>")
    assert backend.token_to_id("<image>") not in shared.encode("<image>").ids
    assert (shared.encode("x a").offsets, backend.encode("x a").offsets) == ([(0, 1), (1, 3)], [(0, 1), (2, 3)])


def parses(function, *arguments):
    """Return the names of the calls that parse or write a tokenizer while `function` runs."""
    called = []

    def record(frame, event, call):
        if event == "c_call" and call.__name__ in PARSES and "Tokenizer" in call.__qualname__:
            called.append(call.__name__)

    sys.setprofile(record)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return called


def test_a_model_to_chat_with_parses_its_tokenizer_once(tiny_base):  # noqa: F811
    def start():
        loaded = load_processor(tiny_base / "base")
        with Engine(tiny_dense("llama"), loaded.tokenizer, slots=1):
            pass

    assert parses(start) == ["from_file"]


def test_the_added_tokens_are_read_without_the_vocabulary(tiny_base, monkeypatch):  # noqa: F811
    read, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **settings: read.append(text) or loads(text, **settings))
    processor = load_processor(tiny_base / "base")
    assert read
    assert not [text for text in read if '"added_tokens"' in text]
    plain = PreTrainedTokenizerFast.from_pretrained(tiny_base / "base")
    assert processor.tokenizer.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert processor.tokenizer.added_tokens_decoder == plain.added_tokens_decoder
    assert processor.tokenizer.special_tokens_map == plain.special_tokens_map
