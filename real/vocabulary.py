"""Cut a language model's vocabulary to the tokens that given texts use: the rows of the other tokens leave its embedding and its head.

Exact: the texts become the same tokens as before, and the logits of the tokens that are kept are the same. Any other text becomes shorter
tokens, down to single characters or bytes.

Why it is exact: byte-pair encoding (BPE) joins the pair of lowest rank, until there is none. The merges that it makes in a text happen
inside the text's final tokens, in the same order as in each of them alone. So if a cut keeps these tokens and what they are merged from,
the pair of lowest rank is the same at every step.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import new_folder, read_object

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
ASCII = [chr(code) for code in range(32, 127)]


def cut_vocabulary(folder: Path, out: Path, texts: Iterable[str]) -> int:
    """Write the cut model of `folder` to `out`, and return the number of rows. Its input embedding and its head must be the same.

    Raises CheckpointError if the tokenizer is no BPE, or if a text becomes other tokens than before.
    """
    texts = list(texts)
    state = read_object(folder / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    used = {token for text in texts for token in tokenizer(text)["input_ids"]}
    kept = _closure(state, used)
    rows = {old: new for new, old in enumerate(sorted(kept.values()))}
    with new_folder(out) as partial:
        _cut_model(folder, rows).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "tokenizer.json").write_text(json.dumps(_cut_tokenizer(state, kept, rows), ensure_ascii=False), encoding="utf-8")
        again = AutoTokenizer.from_pretrained(partial)
        for text in texts:
            if again(text)["input_ids"] != [rows[token] for token in tokenizer(text)["input_ids"]]:
                raise CheckpointError(f"{text!r} becomes other tokens after the cut of the vocabulary of {folder}")
    return len(rows)


def _closure(state: dict[str, Any], used: set[int]) -> dict[str, int]:
    """Return token -> id of the tokens to keep: bytes, printable ASCII, the first special tokens, the used ones, and what these are merged
    from."""
    model = state["model"]
    if model["type"] != "BPE" or model.get("ignore_merges"):
        raise CheckpointError("the vocabulary can be cut only of a BPE tokenizer that merges")
    vocab, ranks = model["vocab"], {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    named = _named(state)
    kept = {token for token in vocab if BYTE.fullmatch(token) or token in ASCII or token in named}
    for token, index in vocab.items():
        if index in used and token not in kept:
            kept |= {token, *_merged_from(token, ranks)}
    return {token: vocab[token] for token in kept}


def _named(state: dict[str, Any]) -> set[str]:
    """Return the special tokens that mean something: all but reserves such as <unused7>."""
    return {each["content"] for each in state["added_tokens"] if each["special"] and "unused" not in each["content"]}


def _merged_from(token: str, ranks: dict[tuple[str, ...], int]) -> set[str]:
    """Return what BPE makes on the way from the characters of a token to the token itself."""
    pieces, seen = list(token), set(token)
    while len(pieces) > 1:
        ranked = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]
        if not ranked:
            raise CheckpointError(f"no merges lead to the token {token!r}")
        _, place = min(ranked)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
        seen.add(pieces[place])
    return seen


def _cut_tokenizer(state: dict[str, Any], kept: dict[str, int], rows: dict[int, int]) -> dict[str, Any]:
    model = state["model"]
    model["vocab"] = {token: rows[old] for token, old in sorted(kept.items(), key=lambda item: item[1])}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept.keys()]
    state["added_tokens"] = [each | {"id": rows[each["id"]]} for each in state["added_tokens"] if each["content"] in kept]
    for special in (state["post_processor"] or {}).get("special_tokens", {}).values():
        special["ids"] = [rows[old] for old in special["ids"]]
    return state


def _cut_model(folder: Path, rows: dict[int, int]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    embedding = model.get_input_embeddings()
    if model.get_output_embeddings().weight is not embedding.weight:
        raise CheckpointError(f"the head of {folder} is not its embedding")
    weight = embedding.weight.data[torch.tensor(list(rows))].clone()
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(weight)
    for config in (model.config, model.generation_config):
        for name in SPECIAL_IDS:
            if (old := getattr(config, name, None)) is not None:
                setattr(config, name, [rows[each] for each in old] if isinstance(old, list) else rows[old])
    return model
