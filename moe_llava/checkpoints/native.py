"""Export sparse models to MoE architectures that transformers and serving engines provide, and read such exports back.

A native architecture has the same attention, norms and embeddings as the dense origin, and MoE layers that compute the same as a SparseMlp.
What an architecture has besides (biases, a shared expert if the model has none) is zero. TARGETS is the table of them; no family is named
elsewhere.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_llava.checkpoints.files import EXPORT_FIELD
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.checkpoints.processors import dense_processor, sparse_processor
from moe_llava.common.errors import CheckpointError
from moe_llava.model.ffn import as_expert, form_of, set_parameter
from moe_llava.model.modeling import SparseLanguageModel, sparse_class
from moe_llava.model.moe import Experts, GatedExperts, SparseMlp
from moe_llava.model.options import MoeOptions
from moe_llava.model.places import find_backbone
from moe_llava.model.upcycling import share_tensors, sparse_config

SHARED_WIDTH = 128  # of a shared expert of zeros: engines divide it among devices, and their kernels need multiples of 8
MAX_DIFFERENCE = 1e-5  # of the logits in float32, relative to the largest

# Run in a process of its own: folder, inputs, file for the logits.
_COMPUTE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert not any(name.partition(".")[0] == "moe_llava" for name in sys.modules), "it imports moe_llava"
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits.contiguous()}, sys.argv[3])
"""


@dataclass(frozen=True)
class Target:
    """A native text architecture.

    `text`, `wrapper`: model types; the wrapper is None where it stays the model's own. `every_layer`: each layer has a router.
    `normalised`: the weights of the chosen experts always sum to 1. `zeros`: modules of an MoE layer, or of attention, that are zero here,
    but for a shared expert that the model has.
    `lost`: fields of the dense configuration that say nothing about an export.
    """

    text: str
    wrapper: str | None = None
    every_layer: bool = False
    normalised: bool = False
    zeros: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


CLOSED_GATE = 0.5  # what the gate of a shared expert computes from weights of zero
SHARED_EXPERT = ("mlp.shared_expert.", "mlp.shared_expert_gate.")
ATTENTION_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
TARGETS = {  # the model type of a wrapper with a text model of its own, or of any wrapper's text model -> targets, the best one first
    "qwen3_vl": (Target("qwen3_vl_moe_text", wrapper="qwen3_vl_moe", normalised=True),),
    "qwen3_5": (
        Target(
            "qwen3_5_moe_text",
            wrapper="qwen3_5_moe",
            every_layer=True,
            normalised=True,
            zeros=SHARED_EXPERT,
            lost=("intermediate_size",),
        ),
    ),
    "qwen3": (Target("qwen3_moe", lost=("max_window_layers",)),),
    "qwen2": (Target("qwen2_moe", zeros=SHARED_EXPERT),),
    "llama": (
        Target("mixtral", every_layer=True, normalised=True),
        Target("qwen2_moe", zeros=SHARED_EXPERT + ATTENTION_BIASES),
    ),
    "mistral": (Target("mixtral", every_layer=True, normalised=True),),
}


@torch.no_grad()
def export_native(sparse: SparseLanguageModel, every_layer: bool = False) -> PreTrainedModel:
    """Return a model of a native MoE architecture that computes what `sparse` does, up to rounding. It shares the tensors of `sparse`.

    Routers compute in float32 here, in the model's dtype there: in half precision a token may choose another expert.

    Args:
        every_layer: turn dense layers into `num_experts` equal experts, for engines and architectures with a router in each layer.

    Raises CheckpointError, naming the reason, if no native architecture can express the model.
    """
    target = find_target(sparse, every_layer)
    config = native_config(sparse, target, every_layer)
    with torch.device("meta"):
        native = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config, dtype=sparse.dtype)
    share_tensors(sparse, native)
    layers = zip(find_backbone(native)[1].layers, find_backbone(sparse)[1].layers, strict=True)
    for layer, origin in layers:
        if isinstance(origin.mlp, SparseMlp):
            layer.mlp.gate.weight = origin.mlp.router.weight  # the experts have the same names
        elif hasattr(layer.mlp, "experts"):
            _fill_equal_experts(layer.mlp, origin.mlp)
        _fill_zeros(layer, target.zeros, next(origin.parameters()))
        if isinstance(origin.mlp, SparseMlp) and origin.mlp.shared_experts is not None:
            _copy_shared(origin.mlp.shared_experts, layer.mlp.shared_expert, 1 / CLOSED_GATE)
    native.tie_weights()
    native.generation_config = copy.deepcopy(sparse.generation_config)
    _save_as_published(native)
    return native.eval()


def find_target(sparse: SparseLanguageModel, every_layer: bool = False) -> Target:
    """Return the native architecture of a sparse model. Raise CheckpointError, naming the reason, if there is none."""
    if not isinstance(sparse, SparseLanguageModel):
        raise CheckpointError(f"{type(sparse).__name__} is not a sparse model of this package: there is nothing to export")
    config, text = sparse.config, sparse.config.get_text_config()
    for problem, found in {
        f"experts in {' and '.join(config.moe_in)}": config.moe_in != ["language_model"],
        "a residual MLP": config.use_residual,
        "a bias of the selection": any(mlp.router.load_bias is not None for mlp in sparse.sparse_mlps().values()),
        f"capacity_factor {config.capacity_factor}": config.capacity_factor is not None,
        f"routing {config.routing}": config.routing == "modality_split",
        "experts without a gate, or with biases": not all(isinstance(experts, GatedExperts) for experts in _experts_of(sparse)),
        f"image placeholder {config.image_token_id} beyond the vocabulary of {text.vocab_size}": config.image_token_id >= text.vocab_size,
    }.items():
        if found:
            raise CheckpointError(f"no native architecture can express {problem}: vLLM serves the checkpoint itself (docs/engines.md)")
    targets = TARGETS.get(config.dense_class.model_type) or TARGETS.get(text.model_type)
    if targets is None:
        rule = f"those with one are {', '.join(TARGETS)}. vLLM serves the checkpoint itself (docs/engines.md)"
        raise CheckpointError(f"a language model of type {text.model_type} has no native MoE architecture; {rule}")
    reasons = []
    for target in targets:
        if target.every_layer and not every_layer and len(config.moe_layer_indices) < text.num_hidden_layers:
            reasons.append(f"{target.text} has a router in every layer: export dense layers as equal experts (--every-layer)")
        elif target.normalised and not config.norm_topk_prob:
            reasons.append(f"the expert weights of {target.text} sum to 1, but norm_topk_prob is false")
        elif every_layer and not config.norm_topk_prob:
            reasons.append("equal experts compute a dense layer only if their weights sum to 1, but norm_topk_prob is false")
        elif every_layer and config.granularity > 1 and len(config.moe_layer_indices) < text.num_hidden_layers:
            reasons.append(f"equal experts are as wide as a dense FFN, but granularity is {config.granularity}")
        elif config.num_shared_experts and SHARED_EXPERT[0] not in target.zeros:
            reasons.append(f"{target.text} has no shared expert")
        elif lost := _lost(text, target):
            reasons.append(f"{target.text} cannot express {', '.join(f'{name} {value!r}' for name, value in lost.items())}")
        else:
            return target
    raise CheckpointError(f"found no native architecture: {'; '.join(dict.fromkeys(reasons))}")


def native_config(sparse: SparseLanguageModel, target: Target, every_layer: bool = False) -> PreTrainedConfig:
    """Return the configuration of an export, with its origin, from which `import_native` restores the sparse model."""
    dense = sparse.config.dense_config()
    text, moe_layers = dense.get_text_config(), sparse.config.moe_layer_indices
    text_class = CONFIG_MAPPING[target.text]
    names = {f.name for f in fields(text_class)}
    experts = {
        "num_experts_per_tok": sparse.config.experts_per_token,
        "router_aux_loss_coef": sparse.config.router_aux_loss_coef,
        "norm_topk_prob": sparse.config.norm_topk_prob,
        "moe_intermediate_size": _experts_of(sparse)[0].intermediate_dim,
        "shared_expert_intermediate_size": _experts_of(sparse)[0].intermediate_dim * sparse.config.num_shared_experts or SHARED_WIDTH,
        "mlp_only_layers": [] if every_layer else [n for n in range(text.num_hidden_layers) if n not in moe_layers],
        "decoder_sparse_step": 1,
    }
    # Engines read the last two even where transformers' class has no such field.
    settings = {name: value for name, value in (text.to_dict() | experts).items() if name in names | {"head_dim", "norm_topk_prob"}}
    native_text = text_class(**settings, num_experts=sparse.config.experts_per_layer)
    # transformers writes num_local_experts; engines read the name of the published checkpoints.
    native_text.__dict__["num_experts"] = sparse.config.experts_per_layer
    # vLLM finds the class of a wrapper's language model by this field.
    native_text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[target.text]] if target.wrapper is None else None
    wrapper = dense.to_dict()
    origin = {
        "model_type": wrapper.pop("model_type"),
        "text_config": wrapper.pop("text_config"),
        "options": {f.name: getattr(sparse.config, f.name) for f in fields(MoeOptions)},
    }
    return CONFIG_MAPPING[target.wrapper or dense.model_type](**wrapper, text_config=native_text, **{EXPORT_FIELD: origin})


@torch.no_grad()
def import_native(native: PreTrainedModel) -> SparseLanguageModel:
    """Return the sparse model that `export_native` exported as `native`, with which it shares tensors.

    Raises CheckpointError if `native` is no such export.
    """
    origin = getattr(native.config, EXPORT_FIELD, None)
    if origin is None:
        raise CheckpointError(f"{type(native).__name__} is no export of this package: its config.json has no field {EXPORT_FIELD}")
    settings = native.config.to_dict()
    for name in ("model_type", "architectures", EXPORT_FIELD):
        settings.pop(name, None)
    dense = CONFIG_MAPPING[origin["model_type"]](**settings | {"text_config": origin["text_config"]})
    config = sparse_config(dense, MoeOptions(**origin["options"]))
    with torch.device("meta"):
        dense_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(dense)]
        sparse = sparse_class(dense_class)._from_config(config, dtype=native.dtype)
    share_tensors(native, sparse)
    for layer, exported in zip(find_backbone(sparse)[1].layers, find_backbone(native)[1].layers, strict=True):
        if isinstance(layer.mlp, SparseMlp):
            layer.mlp.router.weight = exported.mlp.gate.weight
            if layer.mlp.shared_experts is not None:
                layer.mlp.shared_experts.to_empty(device=native.device)
                _copy_shared(exported.mlp.shared_expert, layer.mlp.shared_experts, CLOSED_GATE)
        elif hasattr(exported.mlp, "experts"):
            _take_first_expert(layer.mlp, exported.mlp.experts)
    sparse.tie_weights()
    sparse.generation_config = copy.deepcopy(native.generation_config)
    return sparse.eval()


def write_native(sparse: SparseLanguageModel, processor: Any, folder: Path, every_layer: bool = False) -> list[str]:
    """Export a sparse model with its processor into a folder, and check it. `sparse` has no weights afterwards.

    Returns what to print. Raises CheckpointError as `export_native` does, or if the export computes something else.
    """
    native = export_native(sparse, every_layer)
    native.save_pretrained(folder)
    described = f"{type(native).__name__}, language model {native.config.get_text_config().model_type}"
    del native  # it shares the weights of `sparse`, which are released
    dense_processor(processor).save_pretrained(folder)
    if type(loaded := AutoProcessor.from_pretrained(folder)).__module__.startswith("moe_llava"):
        raise CheckpointError(f"the saved processor is a {type(loaded).__name__}, which only this package has")
    difference = reloaded_difference(folder, sparse, processor)
    if not difference <= MAX_DIFFERENCE:
        raise CheckpointError(f"the export computes other logits: they differ by {difference:.1e} of the largest")
    return [
        described,
        f"logits of a prompt with an image, in float32, reloaded without this package: within {difference:.1e} of the largest",
    ]


def convert_back(path: str | Path, folder: Path) -> list[str]:
    """Write the sparse model of an export, with its processor, into a folder. Returns what to print. Raises as `import_native` does."""
    native, processor = load_checkpoint(path)
    sparse = import_native(native)
    sparse.save_pretrained(folder)
    sparse_processor(processor).save_pretrained(folder)
    return [f"{type(sparse).__name__}, sparse layers {sparse.config.moe_layer_indices}"]


@torch.no_grad()
def reloaded_difference(folder: Path, sparse: SparseLanguageModel, processor: Any) -> float:
    """Return the largest difference between the logits of `sparse`, in float32, and those of an export, relative to the largest logit.

    The export is loaded by a process of its own, without this package. It gets the memory of `sparse`, which has no weights afterwards. The
    prompt has an image and a line of text.
    """
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}
    picture = Image.linear_gradient("L").convert("RGB")
    inputs = processor(text=[processor.apply_chat_template([message], add_generation_prompt=True)], images=[picture], return_tensors="pt")
    expected = sparse.float()(**inputs.to(sparse.device)).logits.cpu()
    sparse.to("meta")
    with TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in inputs.items() if isinstance(value, Tensor)}, given)
        done = subprocess.run(
            [sys.executable, "-c", _COMPUTE, folder.absolute(), given, found], cwd=scratch, capture_output=True, text=True
        )
        if done.returncode:
            raise CheckpointError(f"transformers alone cannot load the export: {done.stderr.strip().splitlines()[-1]}")
        logits = load_file(found)["logits"]
    return float((logits - expected).abs().max() / expected.abs().max())


def _experts_of(sparse: SparseLanguageModel) -> list[Experts]:
    return [mlp.experts for mlp in sparse.sparse_mlps().values()]


def _lost(text: PreTrainedConfig, target: Target) -> dict[str, Any]:
    """Return the fields of a dense text configuration that `target` does not have, except those that change nothing."""
    kept = {f.name for f in fields(CONFIG_MAPPING[target.text])} | {"head_dim", *target.lost}
    found = {f.name: getattr(text, f.name) for f in fields(type(text)) if f.name not in kept and getattr(text, f.name) != f.default}
    if set(found.get("layer_types") or ()) == {"full_attention"}:
        del found["layer_types"]
    return found


def _fill_equal_experts(mlp: Any, ffn: nn.Module) -> None:
    """Make every expert of an MoE layer the dense `ffn`. All weights of the router are zero: whichever experts are chosen, they agree."""
    number = mlp.gate.weight.shape[0]
    for name, one in as_expert(ffn).items():
        set_parameter(mlp.experts, name, one.repeat(number, 1, 1))
    set_parameter(mlp, "gate.weight", torch.zeros_like(mlp.gate.weight, device=one.device, dtype=one.dtype))


def _take_first_expert(ffn: nn.Module, experts: Any) -> None:
    """Undo `_fill_equal_experts`."""
    for name, parts in form_of(ffn).stacked.items():
        for part, weight in zip(parts, getattr(experts, name)[0].chunk(len(parts)), strict=True):
            set_parameter(ffn, part, weight.clone())


def _copy_shared(origin: nn.Module, copied: nn.Module, factor: float) -> None:
    """Copy a shared expert with its outputs multiplied by `factor`."""
    for name, parameter in origin.named_parameters():
        set_parameter(copied, name, parameter * factor if name == "down_proj.weight" else parameter.clone())


def _fill_zeros(layer: nn.Module, names: tuple[str, ...], like: Tensor) -> None:
    """Make the parameters of a layer whose names begin with one of `names` zero."""
    for name, parameter in list(layer.named_parameters()):
        if name.startswith(names):
            set_parameter(layer, name, torch.zeros_like(parameter, device=like.device, dtype=like.dtype))


def _save_as_published(native: PreTrainedModel) -> None:
    """Make `save_pretrained` write the layout of published files, which engines expect.

    transformers keeps the layout in which a model was loaded. For a new model it leaves out two conversions: it transposes no experts, and
    adds no prefix that its class does not have (`vision_model` of CLIP).
    """
    words = {word for name, _ in native.named_parameters() for word in name.split(".")}
    conversions = copy.deepcopy(get_model_conversion_mapping(native, add_legacy=False))
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            if isinstance(operation, Transpose):
                operation.check_dims = False
    native._weight_conversions = [item for item in conversions if getattr(item, "prefix_to_remove", None) not in words]
