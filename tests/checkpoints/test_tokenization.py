import json
import random
import shutil
import unicodedata

import pytest
import tiktoken
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from moe_llava.checkpoints.tokenization import add_placeholder, highest_id, load_tokenizer, read_tiktoken
from moe_llava.common.errors import CheckpointError
from tests.checkpoints.tiny_tokenizers import TEXT, tiktoken_ranks, write_phi, write_tiktoken

# How the published code cuts a text, for both.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def varied_strings(count, special):
    """Words, scripts, white space, odd code points, special tokens."""
    draw = random.Random(0)
    pieces = [*TEXT.split(" "), *special, " ", "  ", "\n", "\r\n\n", "\t", "e\u0301", "\u00a0", "ﬁ", "½", "12345", "I'LL", "<image>"]
    strings = ["".join(draw.choice(pieces) + draw.choice(["", " "]) for _ in range(draw.randint(1, 20))) for _ in range(count // 2)]
    ranges = [(32, 126), (160, 0x2FFF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (9, 13)]
    return strings + ["".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 40))) for _ in range(count // 2)]


@pytest.mark.parametrize(
    ("name", "vocab_size", "first", "count", "pad"),
    [
        ("arcade100k.tiktoken", 100352, 100257, 32, "<|reg0|>"),
        ("arcade100k.tiktoken", 2000, None, 32, "<|reg0|>"),
        ("qwen.tiktoken", 151936, 151643, 208, "<|extra_0|>"),
        ("qwen.tiktoken", 2000, None, 208, "<|extra_0|>"),
    ],
)
def test_encoding_equals_tiktokens(tmp_path, name, vocab_size, first, count, pad):
    ranks = tiktoken_ranks()
    tokenizer = load_tokenizer(write_tiktoken(tmp_path, name), vocab_size)
    gap = name.startswith("arcade")  # the published file leaves one id out
    first = first or len(ranks) + gap
    special = {token: index for token, index in tokenizer.get_vocab().items() if index >= first}
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == first
    assert sorted(special.values()) == list(range(first, first + count))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|endoftext|>", pad, None)
    reference = tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in varied_strings(1000, ["<|endoftext|>", "<|im_start|>", pad]):
        normalised = unicodedata.normalize("NFC", text)  # the published tokenizers do so first
        assert tokenizer.encode(text) == reference.encode(normalised, allowed_special="all"), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == normalised


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"aGk= 0\nnot base64! 1\n", "line 2 of"), (b"aGk=\n", "line 1 of"), (b"aGk= x\n", "line 1 of"), (b"", "is empty")],
)
def test_damaged_tiktoken_files(tmp_path, content, message):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_tiktoken(tmp_path / "qwen.tiktoken")


@pytest.mark.parametrize("fast", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_phi(tmp_path, fast):
    tokenizer = load_tokenizer(write_phi(tmp_path, fast), 512)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, highest_id(tokenizer)) == (502, 500, 502)
    assert tokenizer.encode("a  b<|endoftext|>") == [*tokenizer.encode("a"), 501, *tokenizer.encode("b"), 500]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("token_id", [503, 511, 600])
def test_the_placeholder_gets_its_id_and_changes_no_other(tmp_path, token_id):
    tokenizer = load_tokenizer(write_phi(tmp_path, fast=True), 512)
    with_image = add_placeholder(tokenizer, token_id, "{{ messages }}")
    with_image.save_pretrained(tmp_path / "saved")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for found in (with_image, reloaded):
        assert found.convert_tokens_to_ids("<image>") == found.image_token_id == token_id
        assert found.encode("a<image>\nb") == [*found.encode("a"), token_id, *found.encode("\nb")]
        assert found.decode([token_id]) == "<image>"
        for text in varied_strings(100, ["<|endoftext|>", "<|extra_0|>"]):
            if "<image>" not in text:
                assert found.encode(text) == tokenizer.encode(text)
        assert (found.pad_token_id, found.eos_token_id, found.padding_side) == (502, 500, "left")
        assert found.chat_template == "{{ messages }}"


def test_an_existing_placeholder_keeps_its_id(tmp_path):
    tokenizer = load_tokenizer(write_phi(tmp_path, fast=True), 512)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert add_placeholder(tokenizer, 600, "").convert_tokens_to_ids("<image>") == 503


def test_sentencepiece_files_equal_the_fast_tokenizer(golden, tmp_path):
    """A folder of the original code often has `tokenizer.model` alone; the recorded one has both."""
    source = golden / "tokenizers" / "llama_fast"
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, tmp_path / name)
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    slow, fast = load_tokenizer(tmp_path, 500), load_tokenizer(source, 500)
    assert slow.get_vocab() == fast.get_vocab()
    for text in [*varied_strings(300, ["</s>", "<s>", "<|end_of_turn|>"]), "", " a", "A chat. USER: hi ASSISTANT:"]:
        assert slow.encode(text) == fast.encode(text), repr(text)


def test_a_folder_without_a_tokenizer_and_a_damaged_one(tmp_path):
    assert load_tokenizer(tmp_path, 100) is None
    for name in ("tokenizer.model", "tokenizer.json"):
        for content in (b"nonsense", b"", b"{}"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="cannot be loaded"):
                load_tokenizer(tmp_path, 100)


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    with pytest.raises(CheckpointError, match="must be a BPE model"):
        add_placeholder(load_tokenizer(tmp_path, 2), 2, "")
