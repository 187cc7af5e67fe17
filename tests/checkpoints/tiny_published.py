"""Tiny checkpoints in the published layout, and what they compute, written down a second time and by hand: nothing here looks into the
package's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

D, FFN, LAYERS, HEADS, VOCAB, EXPERTS = 32, 48, 4, 4, 120, 3
MOE_LAYERS = [1, 2]
CLIP, SIGLIP = "openai/clip-tiny", "google/siglip-tiny"
# family -> (names in its config.json, keys and values of its own)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen": {
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 5000.0,
        "rotary_pct": 1.0,
        "no_bias": True,
        "kv_channels": D // HEADS,
        "seq_length": 256,
        "intermediate_size": 2 * FFN,
    },
    "qwen1_5": {"rms_norm_eps": 1e-5, "rope_theta": 5000.0, "num_key_value_heads": HEADS, "intermediate_size": FFN},
    "mistral": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "num_key_value_heads": 2,
        "intermediate_size": FFN,
        "sliding_window": None,
        "max_position_embeddings": 256,
    },
    "llama": {"rms_norm_eps": 1e-5, "rope_theta": 5000.0, "num_key_value_heads": HEADS, "intermediate_size": FFN},
}


def settings_of(
    family: str, sparse: bool = True, tower: str = CLIP, top_k: int = 2, use_residual: bool = False, vocab_size: int = VOCAB
) -> dict[str, Any]:
    """Return the content of config.json."""
    settings = {
        "model_type": f"moe_llava_{family}" if sparse else f"llava_{family}",
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "mm_image_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "torch_dtype": "float32",
        **FAMILIES[family],
    }
    if sparse:
        settings["moe"] = {
            "num_experts": [EXPERTS] * len(MOE_LAYERS),
            "top_k_experts": top_k,
            "moe_layers_idx": MOE_LAYERS,
            "use_residual": use_residual,
            "router_aux_loss_coef": 0.01,
            "capacity_factor": 1.5,
        }
    return settings


def write_towers(folder: Path) -> Path:
    """A CLIP and a SigLIP tower with their preprocessing: 4 x 4 patches."""
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(folder / CLIP)
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder / SIGLIP)
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    clip = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "image_mean": [0.4] * 3}
    siglip = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    for name, own in ((CLIP, clip), (SIGLIP, siglip)):
        (folder / name / "preprocessor_config.json").write_text(json.dumps({**common, **own, "image_std": [0.5] * 3}))
    return folder


def weights_of(settings: dict[str, Any], towers: Path | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under their published names; with `towers`, the tower's too."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    family = settings["model_type"].removeprefix("moe_").removeprefix("llava_")
    qwen = family == "qwen"
    p, layer_list = ("transformer", "h") if qwen else ("model", "layers")
    kv = D // HEADS * settings.get("num_key_value_heads", HEADS)
    vocab = settings["vocab_size"]
    weights = {"lm_head.weight": random(vocab, D), f"{p}.{'wte' if qwen else 'embed_tokens'}.weight": random(vocab, D)}
    weights[f"{p}.{'ln_f' if qwen else 'norm'}.weight"] = 1 + random(D)
    moe = settings.get("moe", {"moe_layers_idx": []})
    ffn = ("w2", "w1", "c_proj") if qwen else ("gate_proj", "up_proj", "down_proj")
    for layer in range(LAYERS):
        at = f"{p}.{layer_list}.{layer}"
        for norm in ("ln_1", "ln_2") if qwen else ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{norm}.weight"] = 1 + random(D)
        if qwen:
            weights |= {f"{at}.attn.c_attn.weight": random(3 * D, D), f"{at}.attn.c_attn.bias": random(3 * D)}
            weights[f"{at}.attn.c_proj.weight"] = random(D, D)
        else:
            for name, rows in (("q", D), ("k", kv), ("v", kv)):
                weights[f"{at}.self_attn.{name}_proj.weight"] = random(rows, D)
                if family == "qwen1_5":
                    weights[f"{at}.self_attn.{name}_proj.bias"] = random(rows)
            weights[f"{at}.self_attn.o_proj.weight"] = random(D, D)
        places = ["mlp"]
        if layer in moe["moe_layers_idx"]:
            weights[f"{at}.mlp.deepspeed_moe.gate.wg.weight"] = random(EXPERTS, D) * 5
            places = [f"mlp.deepspeed_moe.experts.deepspeed_experts.{expert}" for expert in range(EXPERTS)]
            if moe["use_residual"]:
                places.append("mlp.mlp")
                weights |= {f"{at}.mlp.coefficient.weight": random(2, D), f"{at}.mlp.coefficient.bias": random(2)}
        for place in places:
            for name, shape in zip(ffn, ((FFN, D), (FFN, D), (D, FFN)), strict=True):
                weights[f"{at}.{place}.{name}.weight"] = random(*shape)
    for index, width in ((0, 16), (2, D)):
        weights[f"{p}.mm_projector.image_spatial_proj.{index}.weight"] = random(D, width)
        weights[f"{p}.mm_projector.image_spatial_proj.{index}.bias"] = random(D)
    if towers is not None:
        tower = (CLIPVisionModel if settings["mm_image_tower"] == CLIP else SiglipVisionModel).from_pretrained(
            towers / settings["mm_image_tower"]
        )
        for name, tensor in tower.state_dict().items():
            weights[f"{p}.image_tower.image_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    return weights


def write_published(folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def compute(settings: dict[str, Any], weights: dict[str, Tensor], x_SD: Tensor) -> Tensor:
    """Logits [S, V] of the language model for the embeddings [S, D]."""
    qwen = settings["model_type"].endswith("llava_qwen")
    p, at = ("transformer", "transformer.h.{}") if qwen else ("model", "model.layers.{}")
    norm1, norm2 = ("ln_1", "ln_2") if qwen else ("input_layernorm", "post_attention_layernorm")
    for layer in range(LAYERS):
        w = {
            name.removeprefix(at.format(layer) + "."): tensor for name, tensor in weights.items() if name.startswith(at.format(layer) + ".")
        }
        x_SD = x_SD + _attention(settings, w, _norm(x_SD, w[f"{norm1}.weight"]), qwen)
        x_SD = x_SD + _feed_forward(settings, w, _norm(x_SD, w[f"{norm2}.weight"]), qwen)
    return _norm(x_SD, weights[f"{p}.{'ln_f' if qwen else 'norm'}.weight"]) @ weights["lm_head.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _attention(settings: dict[str, Any], w: dict[str, Tensor], x: Tensor, qwen: bool) -> Tensor:
    if qwen:
        q, k, v = F.linear(x, w["attn.c_attn.weight"], w["attn.c_attn.bias"]).split(D, dim=-1)
    else:
        q, k, v = (F.linear(x, w[f"self_attn.{n}_proj.weight"], w.get(f"self_attn.{n}_proj.bias")) for n in "qkv")
    width = D // HEADS
    q, k, v = (t.view(len(x), -1, width).transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(HEADS // t.shape[0], dim=0) for t in (k, v))
    theta = settings.get("rotary_emb_base", settings.get("rope_theta"))
    angle = torch.arange(len(x))[:, None] / theta ** (torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat([f(angle), f(angle)], dim=-1) for f in (torch.cos, torch.sin))

    def rotate(t: Tensor) -> Tensor:
        return t * cos + torch.cat([-t[..., width // 2 :], t[..., : width // 2]], dim=-1) * sin

    scores = rotate(q) @ rotate(k).transpose(1, 2) / width**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), D)
    return mixed @ w["attn.c_proj.weight" if qwen else "self_attn.o_proj.weight"].T


def _feed_forward(settings: dict[str, Any], w: dict[str, Tensor], x: Tensor, qwen: bool) -> Tensor:
    gate, up, down = ("w2", "w1", "c_proj") if qwen else ("gate_proj", "up_proj", "down_proj")

    def ffn(place: str, x: Tensor) -> Tensor:
        hidden = F.silu(x @ w[f"{place}.{gate}.weight"].T) * (x @ w[f"{place}.{up}.weight"].T)
        return hidden @ w[f"{place}.{down}.weight"].T

    if "mlp.deepspeed_moe.gate.wg.weight" not in w:
        return ffn("mlp", x)
    top_k = settings["moe"]["top_k_experts"]
    y = torch.zeros_like(x)
    for row, probs in enumerate((x @ w["mlp.deepspeed_moe.gate.wg.weight"].T).softmax(-1)):
        chosen = probs.argsort(descending=True)[:top_k]
        share = probs[chosen] / probs[chosen].sum() if top_k == 2 else probs[chosen]
        for weight, expert in zip(share, chosen, strict=True):
            y[row] += weight * ffn(f"mlp.deepspeed_moe.experts.deepspeed_experts.{expert}", x[row])
    if settings["moe"]["use_residual"]:
        share = F.linear(x, w["mlp.coefficient.weight"], w["mlp.coefficient.bias"]).softmax(-1)
        y = y * share[:, :1] + ffn("mlp.mlp", x) * share[:, 1:]
    return y
