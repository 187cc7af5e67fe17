"""What a forward pass is given and asked for.

Shapes: B batch, S sequence, T = B * S tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .configuration import SparseConfig
from .greedy import placeholder_ids


@dataclass
class Request:
    """Share the head's needs and the backbone's results between the two: the family's code between them drops unknown arguments.

    `record`: keep the routers' outputs. `token_mask`: [B, S], 0 for padding, instead of the attention mask. `image_mask`: [B, S] or [T]
    bool, the tokens of images, instead of the placeholders in input_ids. `rows`: [B, S] bool, the positions whose hidden states the head
    needs; None for all. Results: `recorded`, the routers' outputs per MoE layer by name; `token_mask_T`, bool, False for padding.
    """

    record: bool
    token_mask: Tensor | None = None
    image_mask: Tensor | None = None
    rows: Tensor | None = None
    recorded: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    token_mask_T: Tensor | None = None


def real_tokens(inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor | None:
    """Return [T] bool, False for padding, for the tokens of this pass; None without a 2-D mask. In decoding the mask also covers the cached
    positions, which come first."""
    mask = inputs.get("attention_mask") if token_mask is None else token_mask
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None  # generation with a static cache passes 4-D masks, one per layer type
    return mask[:, -tokens_of(inputs).shape[1] :].reshape(-1).bool()


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Return the input that has a row for each row of the batch: token ids [B, S], or embeddings [B, S, D]."""
    return inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]


def without_placeholders(config: SparseConfig, module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Replace placeholders that have no row in the embedding table before it is read; image features replace the result."""
    ids, *others = arguments
    for token in placeholder_ids(config):
        if not 0 <= token < module.num_embeddings:
            ids = ids.masked_fill(ids == token, 0)
    return (ids, *others)
