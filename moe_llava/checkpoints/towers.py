"""Which models of transformers are vision towers of a LLaVA: found by running one without weights, not by name.

A LLaVA gives a tower pixels alone, and takes the hidden states of a layer as features. It can leave out the first of them. So a tower must
return a token for each patch, with at most one before them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional as F
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line


def check_tower(config: PreTrainedConfig, size: tuple[int, int] | None = None) -> None:
    """Raise CheckpointError, naming what was found, unless the model of a configuration suits a LLaVA for images of `size` (height, width),
    or of its own size."""
    extra = extra_tokens(config, size)
    if extra > 1:
        raise CheckpointError(
            f"it is a {_kind(config).__name__}, which puts {extra} tokens before its patches, such as registers, but a LLaVA can leave out "
            "only one, a class token"
        )


def extra_tokens(config: PreTrainedConfig, size: tuple[int, int] | None = None) -> int:
    """Return the number of tokens that a tower puts before its patches, such as the class token of CLIP. `size`: (height, width) of images;
    None for the tower's own.

    Raises CheckpointError, naming what was found, if it returns no token for each patch.
    """
    tower = _built(config)
    name, patch = type(tower).__name__, getattr(config, "patch_size", None)
    image = getattr(config, "image_size", None)
    if not isinstance(patch, int) or not isinstance(image, int):
        raise CheckpointError(f"it is a {name}, with image_size {image!r} and patch_size {patch!r}, which must be whole numbers")
    height, width = size or (image, image)
    pixels = torch.empty(1, getattr(config, "num_channels", 3), height, width, device="meta")
    try:
        states = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # each class refuses in its own way
        raise CheckpointError(f"it is a {name}, which refuses images of {height} x {width} pixels: {first_line(error)}") from error
    if not states or len(states) != getattr(config, "num_hidden_layers", -1) + 1:
        raise CheckpointError(f"it is a {name}, which returns {len(states or ())} hidden states, not one before and one after each layer")
    patches, shape = (height // patch) * (width // patch), tuple(states[-2].shape)
    if len(shape) != 3 or shape[1] < patches or shape[2] != config.hidden_size:
        raise CheckpointError(
            f"it is a {name}, whose hidden states of an image have the shape {list(shape)}: not a token, as wide as its hidden_size, for "
            f"each of {patches} patches"
        )
    return shape[1] - patches


def resize_positions(tower: PreTrainedModel, side: int) -> None:
    """Interpolate the position embeddings of a tower for images of `side` pixels, as transformers' `interpolate_pos_encoding` does:
    bicubic, and without the class token.

    Raises CheckpointError unless the tower has one table with a row for each patch of its own images.
    """
    config, name = tower.config, type(tower).__name__
    old, new, extra = config.image_size // config.patch_size, side // config.patch_size, extra_tokens(config)
    tables = [
        parameter
        for key, parameter in tower.named_parameters()
        if "position_embedding" in key and parameter.shape[-2:] == (extra + old**2, config.hidden_size)
    ]
    if len(tables) != 1:
        raise CheckpointError(f"{name} has {len(tables)} tables of {old} x {old} positions, not one for another image size")
    (table,) = tables
    rows_PD = table.data.reshape(-1, config.hidden_size)
    grid = rows_PD[extra:].T.reshape(1, -1, old, old)
    resized = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False).to(table.dtype)
    rows_PD = torch.cat([rows_PD[:extra], resized.reshape(-1, new * new).T])
    table.data = rows_PD.reshape(*table.shape[:-2], *rows_PD.shape)
    config.image_size = side


def _kind(config: PreTrainedConfig) -> Any:
    if type(config) not in MODEL_MAPPING:
        raise CheckpointError(f"it has model_type {config.model_type!r}, which is no model with hidden states in transformers")
    kind = MODEL_MAPPING[type(config)]
    return kind[0] if isinstance(kind, (list, tuple)) else kind


def _built(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model without weights that takes pixels alone. Raises CheckpointError if it takes something else."""
    kind = _kind(config)
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    needed = [each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    if kind.main_input_name != "pixel_values":
        raise CheckpointError(f"it is a {kind.__name__}, which takes {kind.main_input_name}, not pixel_values")
    if others := [name for name in needed if name != "pixel_values"]:
        raise CheckpointError(f"it is a {kind.__name__}, which needs {', '.join(others)} besides pixel_values, all that a LLaVA gives it")
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"it is a {kind.__name__}, which cannot be built: {first_line(error)}") from error
