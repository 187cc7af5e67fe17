"""Greedy decoding, and the token ids that it needs.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import Tensor

PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")  # names of their fields
_TOKEN_FIELDS = ("token_id", "token_ids", "token_index")  # how names of fields with token ids end
_TEXT_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"}

Allowed = Callable[[int, Tensor], list[int]]  # row, its ids so far [S] -> the ids of which one may follow


def write_greedily(model: Any, inputs: dict[str, Any], max_new_tokens: int, allowed: Allowed | None = None) -> Tensor:
    """Return [B, S]: the ids of the inputs and their greedy continuation, of tokens that are `allowed`, if it is given. An ended row is
    padded, possibly with an ordinary token."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "suppress_tokens": never_written(model) or None}
    return model.generate(**inputs, **settings, prefix_allowed_tokens_fn=allowed)


def never_written(model: Any) -> list[int]:
    """Return the ids that are never generated, the image placeholder among them; it may lie outside the vocabulary."""
    return sorted({*as_list(model.generation_config.suppress_tokens), *placeholder_ids(model.config)})


def placeholder_ids(config: Any) -> list[int]:
    """Return the ids that stand for images and videos in a prompt, as a configuration names them."""
    found = (getattr(config, name, None) for name in PLACEHOLDERS)
    return sorted({token for token in found if token is not None})


def media_ids(config: Any) -> list[int]:
    """Return the ids of all tokens of images and videos that a configuration names: placeholders, and those around or between them."""
    fields = {name: value for name, value in config.to_dict().items() if name.endswith(_TOKEN_FIELDS) and name not in _TEXT_FIELDS}
    return sorted({*placeholder_ids(config), *(token for value in fields.values() for token in as_list(value))})


def end_tokens(model: Any) -> list[int]:
    """Return the ids that end an answer; a model may have none."""
    return as_list(model.generation_config.eos_token_id)


def positions(mask_BS: Tensor) -> Tensor:
    """Return [B, S]: the position of each token in its row, not counting padding (0 in the mask)."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


def prefill_positions(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the positions of a padded prompt's tokens: [B, S], or [3, B, S] in families that place the patches of an image by row and
    column (M-RoPE). The next token of a row follows its largest position."""
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None or not any(name.endswith("grid_thw") for name in inputs):
        return positions(inputs["attention_mask"])
    known = signature(rope_index).parameters
    return rope_index(**{name: value for name, value in inputs.items() if name in known})[0]


def as_list(ids: int | list[int] | None) -> list[int]:
    """Return one id, several or none, as configurations hold them, as a list."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
