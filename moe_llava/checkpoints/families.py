"""The published layout, as tables: the names of parameters and settings by language model family.

Nothing else in this room names a family. The published checkpoints keep most of transformers' names; a table lists only the differences.
`*` is the number of a layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One language model family.

    `config`: transformers' model type, which has the class of the configuration.
    `backbone`: prefix of the stored names of the backbone, the projector and the tower.
    `modules`: transformers' name of a module -> its stored name.
    `parts`: transformers' name of a module -> (the stored module that holds it, which part of its rows, how many equal parts).
    `settings`: stored name of a setting -> transformers' name.
    `halved`: settings whose stored value is twice that of transformers.
    `required`: settings that must have this value, if they are stored, for transformers' class to compute the same.
    `template`: the chat template, a key of TEMPLATES in moe_llava/data/templates.py.
    `templates_by_token`: token -> the chat template for a tokenizer that has the token.
    """

    config: str
    backbone: str = "model"
    modules: dict[str, str] = field(default_factory=dict)
    parts: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    halved: tuple[str, ...] = ()
    required: dict[str, Any] = field(default_factory=dict)
    template: str = "v1"
    templates_by_token: dict[str, str] = field(default_factory=dict)

    def stored_name(self, name: str) -> tuple[str, int, int]:
        """Return (stored name, part, number of parts) of a backbone parameter from its name in transformers."""
        module, _, parameter = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", f".{module}.")
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", module)
        stored, part, parts = self.parts.get(pattern) or (self.modules.get(pattern, pattern), 0, 1)
        if layer:
            stored = stored.replace("*", layer[1])
        return f"{self.backbone}.{stored}.{parameter}", part, parts


# The Qwen of 2023 ("v1"). It computes the same as Qwen2: w2 is the gate projection, w1 the up projection.
_QWEN_V1 = Family(
    config="qwen2",
    backbone="transformer",
    modules={
        "embed_tokens": "wte",
        "norm": "ln_f",
        "layers.*.input_layernorm": "h.*.ln_1",
        "layers.*.post_attention_layernorm": "h.*.ln_2",
        "layers.*.self_attn.o_proj": "h.*.attn.c_proj",
        "layers.*.mlp.gate_proj": "h.*.mlp.w2",
        "layers.*.mlp.up_proj": "h.*.mlp.w1",
        "layers.*.mlp.down_proj": "h.*.mlp.c_proj",
    },
    parts={
        "layers.*.self_attn.q_proj": ("h.*.attn.c_attn", 0, 3),
        "layers.*.self_attn.k_proj": ("h.*.attn.c_attn", 1, 3),
        "layers.*.self_attn.v_proj": ("h.*.attn.c_attn", 2, 3),
    },
    settings={
        "layer_norm_epsilon": "rms_norm_eps",
        "rotary_emb_base": "rope_theta",
        "seq_length": "max_position_embeddings",
        "attn_dropout_prob": "attention_dropout",
    },
    halved=("intermediate_size",),
    required={"no_bias": True, "rotary_pct": 1.0},
    template="qwen",
)

# model_type without its prefix "moe_llava_" or "llava_" -> family
FAMILIES = {
    "phi": Family(config="phi", template="phi"),
    "stablelm": Family(
        config="stablelm", settings={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}, template="stablelm"
    ),
    "qwen": _QWEN_V1,
    "qwen1_5": Family(config="qwen2", template="qwen"),
    "mistral": Family(config="mistral", template="mistral", templates_by_token={"<|end_of_turn|>": "openchat"}),
    "llama": Family(config="llama", template="v1"),
}


def published_family(model_type: Any) -> tuple[Family, bool] | None:
    """Return (family, whether it is sparse) of a config.json's model_type; None if that is no published one."""
    match = re.fullmatch(r"(moe_)?llava_(\w+)", str(model_type))
    return (FAMILIES[match[2]], match[1] is not None) if match and match[2] in FAMILIES else None


# transformers' model types of the vision towers of published checkpoints.
TOWERS = ("clip_vision_model", "siglip_vision_model")

# Names below `backbone`, in every family.
PROJECTOR = {"linear_1": "mm_projector.image_spatial_proj.0", "linear_2": "mm_projector.image_spatial_proj.2"}
TOWER = "image_tower.image_tower.vision_model"
# Names below a layer's FFN. `{}` is the number of an expert.
ROUTER = "deepspeed_moe.gate.wg.weight"
EXPERT = "deepspeed_moe.experts.deepspeed_experts.{}"
RESIDUAL = "mlp"
COEFFICIENT = "coefficient"

# Part of the names of a tower's weights that may be missing.
POOLER = "pooler."

# Weights that a checkpoint may hold although nothing uses them: reason -> names. Other weights that are left over are an error.
UNUSED = {
    "constants that are computed": re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids)"),
    "the pooling head of a SigLIP tower, which comes after the layer of the features": re.compile(
        r"(.*\.(vision_model|vision_tower)\.)?head\..*"
    ),
    "the classifier of a tower": re.compile(r"classifier\.(weight|bias)"),
    "the text half of a CLIP or SigLIP": re.compile(r"text_model\..*|logit_scale|logit_bias|(text|visual)_projection\.weight"),
}
