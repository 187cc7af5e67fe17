"""Pieces of text add up to the answer, and none says too much."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_llava.digits.tokenizer import build_tokenizer
from moe_llava.serving.engine.text import Detokenizer


@pytest.fixture
def letters():
    """A tokenizer of bytes: a character may take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces(tokenizer, text, stop=()):
    writing = Detokenizer(tokenizer, stop)
    given = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        given.append(writing.add(token))
        if writing.stopped:
            return given
    return [*given, writing.finish()]


@pytest.mark.parametrize("text", ["plain words", "ein Äpfelchen für 5 €", "日本語 🙂 and more", "e\u0301 combined"])
def test_pieces_add_up_and_characters_are_whole(letters, text):
    given = pieces(letters, text)
    assert "".join(given) == text
    assert not any("\ufffd" in piece for piece in given)


def test_words_are_joined_as_the_tokenizer_joins_them():
    given = pieces(build_tokenizer(), "the red 7 is at the left .")
    assert "".join(given) == "the red 7 is at the left ."
    assert given[:2] == ["the", " red"]


def test_special_tokens_leave_no_trace():
    tokenizer = build_tokenizer()
    writing = Detokenizer(tokenizer)
    tokens = tokenizer.convert_tokens_to_ids(["the", "<pad>", "<s>", "red", "<pad>", "7"])
    assert [writing.add(token) for token in tokens] == ["the", "", "", " red", "", " 7"]


def test_bytes_that_are_no_character_are_told_at_the_end(letters):
    writing = Detokenizer(letters)
    first, second = letters.encode("a€", add_special_tokens=False)[:2]
    assert [writing.add(first), writing.add(second), writing.finish()] == ["a", "", "\ufffd"]


def test_spaces_before_an_answer_are_no_part_of_it(letters):
    assert "".join(pieces(letters, "  two  words")) == "two  words"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("one STO two", ("STOP",), "one STO two"),
        ("aaab", ("aab",), "a"),
        ("one two three", ("three", "two"), "one "),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("STOP", ("STOP",), ""),
        ("ends with STO", ("STOP",), "ends with STO"),
        ("für €5", ("€",), "für "),
    ],
)
def test_stop_strings_that_come_in_parts(letters, text, stop, expected):
    given = pieces(letters, text, stop)
    assert "".join(given) == expected
    assert (expected != text) == (len("".join(given)) < len(text))
