"""The tokenizers of published checkpoints, as fast tokenizers with a placeholder for images.

Unusual here: the placeholder gets the id that it is told, which leaves a gap after the tokenizer's own ids. So it takes no row that a
token has, and none at all of a sparse model's embedding table.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from moe_llava.checkpoints.files import read_json
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line
from moe_llava.data.templates import IMAGE_TOKEN

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TiktokenForm:
    """What a `.tiktoken` file leaves to its tokenizer's code: its special tokens, from id `first_special` on, and which is the unknown
    one. Where the model's vocabulary is too small for that, they follow the file's own ids after `gap` unused ones."""

    first_special: int
    gap: int
    special: tuple[str, ...]
    unknown: str


# How both cut a text before they join bytes; https://huggingface.co/Qwen/Qwen-1_8B and stabilityai/stablelm-2-1_6b say so.
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
TIKTOKEN_FORMS = {
    "arcade100k.tiktoken": TiktokenForm(
        first_special=100257,
        gap=1,
        special=(_END, *_FILL_IN, *_CODE, "<|endofprompt|>", *_CHAT, "<|pause|>", *_REGISTERS, "<|extra0|>"),
        unknown="<|reg0|>",
    ),
    "qwen.tiktoken": TiktokenForm(
        first_special=151643,
        gap=0,
        special=(_END, *_CHAT, *(f"<|extra_{number}|>" for number in range(205))),
        unknown="<|extra_0|>",
    ),
}


class _Converter(TikTokenConverter):
    """transformers' conversion, without its need for the tiktoken package to read the file."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_tiktoken(Path(tiktoken_url))


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer in `folder`, as it was published; None if there is none. `vocab_size`: the model's.

    Raises CheckpointError, naming the file, if it cannot be read.
    """
    for name, form in TIKTOKEN_FORMS.items():
        if (folder / name).is_file():
            return _from_tiktoken(folder / name, form, vocab_size)
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        if (folder / "tokenizer.model").is_file():
            return _from_sentencepiece(folder)
        if (folder / "vocab.json").is_file():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    return None


def add_placeholder(tokenizer: PreTrainedTokenizerFast, token_id: int, chat_template: str) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` that knows `<image>` as `token_id`, unless it knows it already, and that pads on the left.

    Raises CheckpointError if the tokenizer is no byte-pair encoding, the only kind whose ids may have gaps.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise CheckpointError(f"the tokenizer is a {state['model']['type']} model, but must be a BPE model to take the id of {IMAGE_TOKEN}")
    # The library counts added tokens on from the size of the vocabulary, unless they have their ids there.
    vocab = state["model"]["vocab"]
    vocab.update({added["content"]: added["id"] for added in state["added_tokens"]})
    vocab.setdefault(IMAGE_TOKEN, token_id)
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([_special(IMAGE_TOKEN)])
    names = {name: getattr(tokenizer, name) for name in SPECIAL_NAMES}
    # The original code pads with the unknown token, which its tokenizers never give for a text.
    names["pad_token"] = names["pad_token"] or names["unk_token"] or names["eos_token"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def highest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values())


def read_tiktoken(file: Path) -> dict[bytes, int]:
    """Bytes -> rank. A line holds both: base64, a space, a number.

    Raises CheckpointError, naming the line, if it does not.
    """
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


def _from_tiktoken(file: Path, form: TiktokenForm, vocab_size: int) -> PreTrainedTokenizerFast:
    converter = _Converter(vocab_file=str(file), pattern=_PATTERN)
    state = json.loads(converter.converted().to_str())
    vocab = state["model"]["vocab"]
    start = form.first_special
    if start + len(form.special) > vocab_size:
        start = max(vocab.values()) + 1 + form.gap
    vocab.update({token: start + index for index, token in enumerate(form.special)})
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([_special(token) for token in form.special])
    names = {"eos_token": _END, "unk_token": form.unknown, "pad_token": form.unknown} | _named_tokens(file.parent)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer_config.json"
    legacy = not file.is_file() or read_json(file).get("legacy", True)
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy)
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise CheckpointError("tokenizer.model holds no tokens")
    if legacy:
        # SentencePiece puts a space before every stretch of text, also where one is already; transformers 5 does not there.
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return tokenizer


def _named_tokens(folder: Path) -> dict[str, Any]:
    """What the folder's own files call the end of a text, padding and so on."""
    named: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        named |= {key: content[key] for key in (*SPECIAL_NAMES, "model_max_length") if content.get(key)}
    return {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)
