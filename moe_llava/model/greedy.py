"""How a model writes: the likeliest token, one after the other, up to an end.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def write_greedily(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> Tensor:
    """[B, S]: the inputs' ids, continued. What follows an end is padding, with a token that need not be a special one."""
    never = never_written(model) or None
    return model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, suppress_tokens=never)


def never_written(model: Any) -> list[int]:
    """Tokens that are never chosen. A placeholder in an answer would be one without an image; it may lie outside the vocabulary."""
    image = getattr(model.config, "image_token_id", None)
    return sorted({*as_list(model.generation_config.suppress_tokens), *as_list(image)})


def end_tokens(model: Any) -> list[int]:
    """Those that end an answer; a model may have none."""
    return as_list(model.generation_config.eos_token_id)


def positions(mask_BS: Tensor) -> Tensor:
    """[B, S]: where each token stands in its row; padding, 0 in the mask, counts nowhere, wherever it stands."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


def as_list(ids: int | list[int] | None) -> list[int]:
    """Configurations have one id, several, or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
