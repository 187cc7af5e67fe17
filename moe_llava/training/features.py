"""Features of the frozen tower, cached on disk: each image goes through the tower once, in all epochs, stages and runs.

Unusual here: while a stage is trained, the tower computes by another `forward`, which is an attribute of that one module. So parameters
keep their names, and a save holds the tower as always.

An entry is a file, named by digests of the tower's weights, of its settings, and of the pixels. So another tower, another preprocessing, or
another picture under an old name finds nothing. An entry is written under another name and renamed: processes may share the folder, and a
killed process leaves no half-written entry.

Shapes: N images, P patches, the class token included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moe_llava.training.recipe import RecipeError
from moe_llava.training.saves import full_disk_named

# The model types that read nothing of a tower but the hidden states of `vision_feature_layer`, image by image. Others read its last output
# too (InternVL), or compute all images of a batch as one (Mistral 3), or with a mask of their patches (Aria).
FAMILIES = ("llava", "llava_next", "llava_onevision", "vipllava", "aya_vision")
PACKED = "pixtral"  # a tower that computes all images of a batch as one sequence


def check_cache(folder: str, model: PreTrainedModel) -> None:
    """Make the folder. Raises RecipeError if that fails, if `model`, which may be on the meta device, is of none of FAMILIES, or if its
    tower is packed or random."""
    family = getattr(model.config, "dense_class", type(model.config)).model_type
    if family not in FAMILIES:
        raise RecipeError(
            f"feature_cache is set, but the model is of type {family}: only {', '.join(FAMILIES)} are known to take from their tower "
            "nothing but the hidden states of each image, which are what is cached; leave it out"
        )
    if model.config.vision_config.model_type == PACKED:
        raise RecipeError(f"feature_cache is set, but the model's tower, {PACKED}, computes all images of a batch as one: leave it out")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"feature_cache is {folder}, which is no folder and cannot become one: {error.strerror}") from error
    config = model.config.vision_config.to_dict()
    random = [f"{key} {value}" for key, value in config.items() if ("dropout" in key or "drop_path" in key) and value]
    if random:
        raise RecipeError(f"feature_cache is set, but the tower's features are random while it is trained with: {', '.join(random)}")


@contextlib.contextmanager
def cached_features(model: PreTrainedModel, folder: str) -> Iterator[None]:
    """Within this context, the tower of `model` reads the features of images that it has seen before from `folder`, and writes new ones.

    Raises ValueError if the tower is trainable: its features would change.
    """
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(f"the features of a trainable tower cannot be kept in {folder}: leave feature_cache out")
    tower.forward = FeatureCache(Path(folder), tower, [layers] if isinstance(layers, int) else list(layers))
    try:
        yield
    finally:
        del tower.forward


class FeatureCache:
    """Replace `tower.forward`: return the hidden states of `layers` and nothing else, which is all that FAMILIES use."""

    def __init__(self, folder: Path, tower: Any, layers: list[int]):
        self.folder = folder
        self.compute = tower.forward
        self.states = tower.config.num_hidden_layers + 1
        self.layers = sorted({layer % self.states for layer in layers})  # -1 is the last
        settings = {key: value for key, value in tower.config.to_dict().items() if key != "_name_or_path"}
        how = f"{json.dumps(settings, sort_keys=True, default=str)} {self.layers} {tower.config._attn_implementation}"
        self.described = f"{digest(tower.state_dict())} {how}"

    @torch.compiler.disable
    def __call__(self, pixel_values: Tensor, **settings: Any) -> BaseModelOutputWithPooling:
        """pixel_values: [N, channels, height, width]. Each of `layers` is [N, P, width] among the hidden states; the others are None."""
        files = self._files(pixel_values)
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        entries = [{} if index in missing else read_entry(file, pixel_values.device) for index, file in enumerate(files)]
        if missing:
            computed = self.compute(pixel_values[missing], **settings).hidden_states
            for row, index in enumerate(missing):
                entries[index] = {str(layer): computed[layer][row].contiguous() for layer in self.layers}
                write_entry(files[index], entries[index])
        states: list[Any] = [None] * self.states
        for layer in self.layers:
            states[layer] = torch.stack([entry[str(layer)] for entry in entries])
        return BaseModelOutputWithPooling(hidden_states=tuple(states))

    def _files(self, pixel_values: Tensor) -> list[Path]:
        device = pixel_values.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tower = hashlib.sha256(f"{self.described} {device} {precision}".encode()).hexdigest()[:16]
        names = [digest({"pixels": pixels}) for pixels in pixel_values.cpu()]
        return [self.folder / tower / name[:2] / f"{name}.safetensors" for name in names]


def digest(tensors: dict[str, Tensor]) -> str:
    """Return a digest of names, shapes, types and all values."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_entry(file: Path, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of an entry of a cache. Raises ValueError if it is damaged."""
    try:
        return load_file(file, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole entry of a cache, though its name says so ({error}): remove it") from error


def write_entry(file: Path, entry: dict[str, Tensor]) -> None:
    """Write an entry of a cache under another name and rename it. Raises SaveError if there is no room."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{uuid.uuid4().hex}")  # of this process alone
    try:
        with full_disk_named(file.parent):
            save_file(entry, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
