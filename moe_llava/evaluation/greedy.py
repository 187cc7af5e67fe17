"""How a model writes: the likeliest token, one after the other, up to an end.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def write_greedily(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> Tensor:
    """[B, S]: the inputs' ids, continued. What follows an end is padding, with a token that need not be a special one."""
    # A placeholder in an answer would be one without an image.
    never = sorted({*(model.generation_config.suppress_tokens or []), model.config.image_token_id})
    return model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, suppress_tokens=never)


def end_tokens(model: Any) -> list[int]:
    """Those that end an answer; a model may have none."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
