"""Small tokenizers, trained here, in the files of the published ones."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SCRIPTS = "这张图片里有什么 Ελλάδα Привет naïve café 🚤👩‍👩‍👧 aaaa abab\r\n\t x**2 == 1969"
TEXT = (Path(__file__).parents[2] / "README.md").read_text() + SCRIPTS * 5


def train(size=900):
    """A byte-pair encoding of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def to_bytes(token):
    """Return the bytes of a byte-level token's characters."""
    byte_of = {}
    spare = 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        byte_of[chr(byte) if printable else chr(spare)] = byte
        spare += not printable
    return bytes(byte_of[character] for character in token)


@cache
def tiktoken_ranks():
    """Bytes -> rank: the single bytes, then the merged tokens in the order in which they were learnt."""
    merged = sorted(train().get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes([byte]) for byte in range(256)] + [to_bytes(token) for token, _ in merged if len(to_bytes(token)) > 1]
    return {token: rank for rank, token in enumerate(tokens)}


def write_tiktoken(folder, name):
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in tiktoken_ranks().items()]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def write_phi(folder, fast):
    """Phi's files: a byte-level encoding, and added tokens: a padding token, and runs of spaces."""
    tokenizer = train(size=500)
    state = json.loads(tokenizer.to_str())
    vocab = {**state["model"]["vocab"], "<|endoftext|>": 500}
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    added = {
        500: {"content": "<|endoftext|>", "special": True, "normalized": False, **flags},
        501: {"content": "  ", "special": False, "normalized": True, **flags},
        502: {"content": "<|extra_0|>", "special": True, "normalized": False, **flags},
    }
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|extra_0|>", "pad_token": "<|extra_0|>"}
    config = {"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": {str(key): value for key, value in added.items()}, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 2048}))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps({value["content"]: key for key, value in added.items() if key > 500}))
    if fast:
        state["model"]["vocab"] = vocab
        state["added_tokens"] = [{"id": key, **value} for key, value in added.items()]
        (folder / "tokenizer.json").write_text(json.dumps(state))
    else:
        (folder / "vocab.json").write_text(json.dumps(vocab))
        merges = [" ".join(merge) for merge in state["model"]["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder
