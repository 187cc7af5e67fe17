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

Not modelled: the tower, which is frozen, so that only its largest layer counts for a moment, unless it has experts; the projector;
attention masks; the temporary tensors of one operation; what families compute besides, such as state-space layers, which count as
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_llava.model import SparseModel
from moe_llava.model.ffn import FFN_FORMS, PLAIN
from moe_llava.model.moe import PlainExperts, SparseMlp
from moe_llava.training.parts import PARTS, decoder_layers, native_experts, parts_of

_ROWS_OF_LOGITS = 3
_MULTIPLIED = ("attention", "FFN", "experts")


@dataclass(frozen=True)
class Batch:
    """A micro batch on one device. `length`: tokens of each row, those of images included. `labelled`: positions with a label, of all."""

    rows: int
    length: int
    labelled: int

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
    kept = [number * batch.tokens * size for number in layers]
    inputs = sum(number > 0 for number in layers) * width * batch.tokens * size
    head = model.get_output_embeddings().weight
    final = width * batch.tokens * size * (3 if head.requires_grad else 1) + head.requires_grad * batch.labelled * width * size
    row = batch.labelled * head.shape[0] * 4
    saved = (inputs if checkpointing else sum(kept)) + final + row
    copies = 2 * sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and parts[name] in _MULTIPLIED) if bf16 else 0
    return Activations(saved, saved + (max(kept, default=0) if checkpointing else 0) + (_ROWS_OF_LOGITS - 1) * row + copies)


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
        numbers = max(t, f) * width + _ffn_numbers(layer, columns, f) + 2 * experts * width
        if below or t:
            outputs = t * width if len(wide) > 1 else 0  # attention and FFN side by side have one norm
            numbers += (len(wide) + t * len(scaled)) * width + outputs + (4 + t) * queries + heads * context
        below = below or t or f
        found.append(numbers if below else 0)
    return found


def _ffn_numbers(layer: nn.Module, columns: int, trained: bool) -> int:
    """Return what an FFN keeps for a token. `columns`: of its matrices, side by side; of those of a token's experts if it is sparse."""
    ffn: Any = getattr(layer, "mlp", None)
    activation: Any
    if isinstance(ffn, SparseMlp):
        plain, activation = isinstance(ffn.experts, PlainExperts), ffn.experts.act_fn
    else:
        names = {name for name, _ in ffn.named_parameters()} if isinstance(ffn, nn.Module) else set()
        form = next((form for form in FFN_FORMS if names == form.dense_names and hasattr(ffn, form.activation)), None)
        plain, activation = form is PLAIN, None if form is None else getattr(ffn, form.activation)
    kept = 1 if activation is None else _kept_by(activation)
    return (kept + trained) * columns // 2 if plain else (kept + 2 + trained) * columns // 3


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
