"""Predict the memory of activations in training, from a model on the meta device.

What a layer of the decoder keeps for the backward pass, in numbers per token (D width, Q width of all heads, F width of the FFN, K experts
per token; t: attention and norms are trained, f: the FFN or the experts are trained; each 0 or 1):

    N norms             N D + t N' D + (t + max(t, f)) D   inputs; of N' RMS norms the outputs without scale; outputs, which products need
    attention           4 Q + t Q                        queries, keys, values, output; the output in the order of tokens
    "eager" besides     heads x context                  attention weights; other implementations keep none
    FFN, gated          (A + 2) F + f F                  what the activation keeps (silu: 1); activated gate, up; their product
    FFN, plain          A F + f F                        the same; after the activation
    sparse FFN          K (FFN + 2 D)                    dispatched tokens; outputs before they are combined

A layer keeps something only if a trained parameter lies in it or below it: in stage III, layers below the first sparse one keep nothing,
and the first one only its FFN. With gradient checkpointing, a layer keeps its input, D, and one layer at a time has the rest.

Then come the final norm, D + 2 t D, and for each position with a label three rows of the vocabulary in float32: logits, their logarithmic
softmax, and its gradient. In bf16 the layers' numbers have two bytes, and autocast keeps a copy of the weights that it multiplies with.

With a teacher come three more such rows: its probabilities and what their divergence keeps (measured on a CPU, live and cached).

A tower whose FFNs are trained keeps the same for each patch, with two norms and attention that are frozen.

Not modelled: a tower that is frozen, of which only the largest layer counts for a moment; the projector; attention masks; the temporary
tensors of one operation; what families compute besides, such as state-space layers, which count as attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_llava.model import SparseModel
from moe_llava.model.ffn import FFN_FORMS
from moe_llava.model.moe import PlainExperts, SparseMlp
from moe_llava.model.places import tower_layers
from moe_llava.training.parts import PARTS, decoder_layers, native_experts, parts_of

_ROWS_OF_LOGITS, _ROWS_OF_TEACHER = 3, 3
_CAST = ("attention", "FFN", "experts")  # parts whose products autocast computes in bfloat16


@dataclass(frozen=True)
class Batch:
    """A micro batch on one device. `length`: tokens of each row, those of images included. `labelled`: positions with a label, of all.
    `patches`: those of all images, which count if the tower is trained. `taught`: a teacher predicts the labels, too."""

    rows: int
    length: int
    labelled: int
    patches: int = 0
    taught: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Activations:
    """Bytes. `saved`: kept from the forward to the backward pass, with one row of the vocabulary per label. `peak`: with all three, with
    the largest layer that is recomputed, and with the copies of the weights."""

    saved: int
    peak: int


def activations(model: PreTrainedModel, batch: Batch, checkpointing: bool = False, bf16: bool = False, eager: bool = False) -> Activations:
    """Return what a training step of a model keeps, by the `requires_grad` of its parameters. `eager`: the attention implementation."""
    text: Any = model.config.get_text_config()
    size, width, parts = 2 if bf16 else 4, text.hidden_size, parts_of(model)
    trained = {parts[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = _layer_numbers(model, batch.length if eager else 0, bool(trained & {"tower", "projector", "embeddings"}))
    tower = _tower_numbers(model, batch.patches // batch.rows if eager else 0) if "tower" in trained else []
    kept = [number * batch.tokens * size for number in layers] + [number * batch.patches * size for number in tower]
    inputs = sum(number > 0 for number in layers) * width * batch.tokens * size
    inputs += sum(number > 0 for number in tower) * _tower_width(model) * batch.patches * size
    head = model.get_output_embeddings().weight
    final = width * batch.tokens * size * (3 if head.requires_grad else 1) + head.requires_grad * batch.labelled * width * size
    row = batch.labelled * head.shape[0] * 4
    saved = (inputs if checkpointing else sum(kept)) + final + row
    multiplied = [p for name, p in model.named_parameters() if parts[name] in _CAST or (parts[name] == "tower" and p.requires_grad)]
    copies = 2 * sum(p.numel() for p in multiplied if p.dim() > 1 and p.dtype == torch.float32) if bf16 else 0
    rows = (_ROWS_OF_LOGITS - 1 + batch.taught * _ROWS_OF_TEACHER) * row
    return Activations(saved, saved + (max(kept, default=0) if checkpointing else 0) + rows + copies)


def _layer_numbers(model: PreTrainedModel, context: int, below: bool) -> list[int]:
    """Return how many numbers each layer keeps for a token. `below`: something is trained below the layers."""
    text: Any = model.config.get_text_config()
    width, heads = text.hidden_size, text.num_attention_heads
    queries = heads * (getattr(text, "head_dim", None) or width // heads)
    parts, names = parts_of(model), {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {group.layer: (group.top_k, group.num_experts) for group in native_experts(model)}
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        trained: set[str] = set()
        sizes = dict.fromkeys(PARTS, 0)
        for parameter in layer.parameters():
            part = parts[names[id(parameter)]]
            sizes[part] += parameter.numel() if parameter.dim() > 1 else 0
            trained |= {part} if parameter.requires_grad else set()
        t, f = bool(trained & {"attention", "norms"}), bool(trained & {"FFN", "experts", "router"})
        if isinstance(model, SparseModel) and sizes["experts"]:
            chosen[index] = model.config.experts_per_token, model.config.experts_per_layer
        experts, of = chosen.get(index, (0, 1))
        norms = {name: parameter.numel() for name, parameter in layer.named_parameters() if parts[names[id(parameter)]] == "norms"}
        wide = [name.removesuffix(".weight") for name, size in norms.items() if size == width and name.endswith(".weight")]
        scaled = [name for name in wide if f"{name}.bias" not in norms]
        columns = (sizes["FFN"] + sizes["experts"] * experts // of) // width
        numbers = max(t, f) * width + _ffn_numbers(getattr(layer, "mlp", None), columns, f) + 2 * experts * width
        if below or t:
            outputs = t * width if len(wide) > 1 else 0  # attention and FFN side by side have one norm
            numbers += (len(wide) + t * len(scaled)) * width + outputs + (4 + t) * queries + heads * context
        below = below or t or f
        found.append(numbers if below else 0)
    return found


def _tower_width(model: PreTrainedModel) -> int:
    return int(model.config.vision_config.hidden_size)


def _tower_numbers(model: PreTrainedModel, context: int) -> list[int]:
    """Return how many numbers each layer of the vision tower keeps for a patch, if only FFNs are trained in it. `context`: patches of an
    image, for "eager" attention."""
    width, vision, below, found = _tower_width(model), model.config.vision_config, False, []
    heads = vision.num_attention_heads if hasattr(vision, "num_attention_heads") else vision.num_heads
    for layer in tower_layers(model)[1]:
        ffn: Any = layer.mlp
        experts, used = 0, sum(parameter.numel() for parameter in ffn.parameters() if parameter.dim() > 1)
        if isinstance(ffn, SparseMlp):
            experts, of = ffn.router.top_k, ffn.router.num_experts
            idle = sum(parameter.numel() for parameter in ffn.experts.parameters() if parameter.dim() > 2) * (of - experts) // of
            used -= idle + ffn.router.weight.numel()
        trained = any(parameter.requires_grad for parameter in ffn.parameters())
        numbers = trained * width + _ffn_numbers(ffn, used // width, trained) + 2 * experts * width
        numbers += below * (6 * width + heads * context)  # two norms; queries, keys, values and output
        below = below or trained
        found.append(numbers if below else 0)
    return found


def _ffn_numbers(ffn: Any, columns: int, trained: bool) -> int:
    """Return what an FFN keeps for a token. `columns`: of its matrices, side by side; of those of a token's experts if it is sparse."""
    plain, activation = layout_of(ffn)
    kept = 1 if activation is None else _kept_by(activation)
    return (kept + trained) * columns // 2 if plain else (kept + 2 + trained) * columns // 3


def layout_of(ffn: Any) -> tuple[bool, Any]:
    """Return (whether an FFN has two matrices and no gate, its activation). One that no row of FFN_FORMS describes counts as gated, and its
    activation is None."""
    if isinstance(ffn, SparseMlp):
        return isinstance(ffn.experts, PlainExperts), ffn.experts.act_fn
    names = set() if ffn is None else {name for name, _ in ffn.named_parameters()}
    form = next((form for form in FFN_FORMS if names == form.dense_names and hasattr(ffn, form.activation)), None)
    return (False, None) if form is None else (issubclass(form.experts, PlainExperts), getattr(ffn, form.activation))


def _kept_by(activation: Callable[[Tensor], Tensor]) -> int:
    """Return how many tensors of its input's size an activation function keeps: some are several operations of torch."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == len(x):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        activation(x)
    return max(1, len(kept))
