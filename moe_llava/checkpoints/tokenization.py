"""The tokenizers of published checkpoints, as fast tokenizers with a placeholder for images.

Unusual here: the placeholder gets a given id, which leaves a gap after the tokenizer's own ids. So it shares no row with a token, and has
no row at all in a sparse model's embedding table.
"""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from moe_llava.checkpoints.files import read_json
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line
from moe_llava.data.templates import IMAGE_TOKEN

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Specials:
    """The special tokens of a `.tiktoken` file, which are defined by its tokenizer's code, with ids from `first_id`. If the model's
    vocabulary is too small for that, they follow the ids of the file after `gap` unused ones. `unknown`: the one for unknown tokens and
    padding."""

    first_id: int
    gap: int
    tokens: tuple[str, ...]
    unknown: str


# How both split a text before they merge bytes (https://huggingface.co/Qwen/Qwen-1_8B and stabilityai/stablelm-2-1_6b).
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END = "<|endoftext|>"
_FILL_IN = tuple(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad"))
_CODE = tuple(
    f"<{name}>"
    for name in (
        *("gh_stars", "filename", "issue_start", "issue_comment", "issue_closed", "jupyter_start", "jupyter_text", "jupyter_code"),
        *("jupyter_output", "empty_output", "commit_before", "commit_msg", "commit_after", "reponame"),
    )
)
_CHAT = ("<|im_start|>", "<|im_end|>")
_REGISTERS = tuple(f"<|reg{number}|>" for number in range(8))
TIKTOKEN_FILES = {
    "arcade100k.tiktoken": Specials(
        first_id=100257,
        gap=1,
        tokens=(_END, *_FILL_IN, *_CODE, "<|endofprompt|>", *_CHAT, "<|pause|>", *_REGISTERS, "<|extra0|>"),
        unknown="<|reg0|>",
    ),
    "qwen.tiktoken": Specials(
        first_id=151643, gap=0, tokens=(_END, *_CHAT, *(f"<|extra_{number}|>" for number in range(205))), unknown="<|extra_0|>"
    ),
}


class _Converter(TikTokenConverter):
    """The conversion of transformers, which would need the tiktoken package to read the file."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_tiktoken(Path(tiktoken_url))


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer in `folder`, as it was published; None if there is none. `vocab_size`: that of the model.

    Raises CheckpointError, naming the file, if it cannot be read.
    """
    for name, specials in TIKTOKEN_FILES.items():
        if (folder / name).is_file():
            return _from_tiktoken(folder / name, specials, vocab_size)
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        if (folder / "tokenizer.model").is_file():
            return _from_sentencepiece(folder)
        if (folder / "vocab.json").is_file():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no other class
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    return None


def stated_tokens(folder: Path) -> dict[str, Any]:
    """Return a setting for `from_pretrained` that spares it reading the whole tokenizer.json of `folder` as Python objects: it wants only
    the added tokens, unless it is given them. Empty if other files name them, as older versions wrote them."""
    file = folder / "tokenizer.json"
    if not file.is_file() or any((folder / name).is_file() for name in ("special_tokens_map.json", "added_tokens.json")):
        return {}
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings or isinstance(settings.get("extra_special_tokens"), dict):
        return {}
    head, _, rest = file.read_text(encoding="utf-8").partition('"added_tokens":')
    if not rest or '"model":' in head:
        return {}
    tokens, _ = json.JSONDecoder().raw_decode(rest.lstrip())
    return {"added_tokens_decoder": {str(token.pop("id")): token for token in tokens}}


def add_placeholder(tokenizer: PreTrainedTokenizerFast, token_id: int, chat_template: str) -> PreTrainedTokenizerFast:
    """Return a copy of `tokenizer` that has `<image>` as `token_id`, unless it has that token already, and that pads on the left.

    Raises CheckpointError if the tokenizer is no byte-pair encoding, the only kind whose ids may have gaps.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise CheckpointError(f"the tokenizer is a {state['model']['type']} model, but must be a BPE model to take the id of {IMAGE_TOKEN}")
    # The library gives added tokens the ids after the size of the vocabulary, unless they have ids in it.
    vocab = state["model"]["vocab"]
    vocab.update({added["content"]: added["id"] for added in state["added_tokens"]})
    vocab.setdefault(IMAGE_TOKEN, token_id)
    _add_special(state, IMAGE_TOKEN)
    names = {name: getattr(tokenizer, name) for name in SPECIAL_NAMES}
    # The original code pads with the unknown token, which its tokenizers return for no text.
    names["pad_token"] = names["pad_token"] or names["unk_token"] or names["eos_token"]
    return _from_state(
        state,
        **names,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def highest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the highest token id."""
    return max(tokenizer.get_vocab().values())


def read_tiktoken(file: Path) -> dict[bytes, int]:
    """Return bytes -> rank. Each line holds base64, a space, and a number. Raises CheckpointError, naming the line, if one does not."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"line {number} of {file} is {line[:60]!r}, but must be base64 and a number") from error
    if not ranks:
        raise CheckpointError(f"{file} is empty")
    return ranks


def _from_tiktoken(file: Path, specials: Specials, vocab_size: int) -> PreTrainedTokenizerFast:
    state = json.loads(_Converter(vocab_file=str(file), pattern=_PATTERN).converted().to_str())
    vocab = state["model"]["vocab"]
    fits = specials.first_id + len(specials.tokens) <= vocab_size
    first_id = specials.first_id if fits else max(vocab.values()) + 1 + specials.gap
    vocab.update({token: token_id for token_id, token in enumerate(specials.tokens, start=first_id)})
    state["normalizer"] = {"type": "NFC"}
    for token in specials.tokens:
        _add_special(state, token)
    names = {"eos_token": _END, "unk_token": specials.unknown, "pad_token": specials.unknown} | _named_tokens(file.parent)
    return _from_state(state, **names)


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer_config.json"
    legacy = not file.is_file() or read_json(file).get("legacy", True)
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy)
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise CheckpointError("tokenizer.model holds no tokens")
    if legacy:
        # SentencePiece puts a space before every piece of text; transformers 5 does not where there is one already.
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return tokenizer


def _named_tokens(folder: Path) -> dict[str, Any]:
    """Return the special tokens that the folder's own files name, such as the end of a text and padding."""
    named: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        named |= {key: content[key] for key in (*SPECIAL_NAMES, "model_max_length") if content.get(key)}
    return {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}


def _add_special(state: dict[str, Any], token: str) -> None:
    """Add a word of the vocabulary to the special tokens of a tokenizer.json, unless it is one of its added tokens."""
    if all(added["content"] != token for added in state["added_tokens"]):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        state["added_tokens"].append({"id": state["model"]["vocab"][token], "content": token} | flags)


def _from_state(state: dict[str, Any], **settings: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tokenizer.json. It is passed as a file, because the class would copy an object, which takes as long."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(json.dumps(state), encoding="utf-8")
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)
