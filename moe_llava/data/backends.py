"""Copies of a tokenizer that share its vocabulary.

Copying a tokenizer of the tokenizers library writes it as JSON and parses it again, which takes longer than loading it from its file.
The model of a tokenizer, which is its vocabulary and merges, never changes here, so copies share it. Each copy has added tokens and
settings of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def copy_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer for another thread: a call may set truncation and padding, which no other thread should see."""
    if not tokenizer.is_fast:
        return copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    return copy.deepcopy(tokenizer, {id(backend): share_vocabulary(backend, {})})


def share_vocabulary(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """Return a copy without truncation and padding. `names`: other names for added tokens that are not in the model's vocabulary."""
    shared = Tokenizer(backend.model)
    for part in _PARTS:
        if (value := getattr(backend, part)) is not None:
            setattr(shared, part, value)
    # In this order the library gives them the same ids again.
    for _, token in sorted(backend.get_added_tokens_decoder().items()):
        shared.add_tokens([_renamed(token, names.get(token.content, token.content))])
    return shared


def _renamed(token: AddedToken, name: str) -> AddedToken:
    flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(name, **flags)


def report_spaces(backend: Tokenizer) -> None:
    """Make a tokenizer report tokens with their white space, which byte-level ones leave out."""
    if backend.post_processor is not None:
        processor = copy.deepcopy(backend.post_processor)  # may be shared
        processor.__setstate__(processor.__getstate__().replace(b'"trim_offsets":true', b'"trim_offsets":false'))
        backend.post_processor = processor
