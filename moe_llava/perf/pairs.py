"""A sparse model and its dense partner with as many active parameters, and the speed of their forward passes. The partner has the same
backbone, but in the chosen layers an FFN as wide as a token's experts together. Weights are random: speed does not depend on them.

A rival is the sparse model with another implementation of its sparse layers, and the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from moe_llava.digits.base import WEIGHTS
from moe_llava.model import MoeLlavaConfig
from moe_llava.model.configuration import SparseConfig
from moe_llava.model.ffn import form_of, narrowed, set_parameter
from moe_llava.model.modeling import sparse_class
from moe_llava.model.moe import SparseMlp
from moe_llava.model.places import find_backbone
from moe_llava.perf.layers import CHECKED_TOKENS, TOLERANCE, relative
from moe_llava.perf.measure import add_notes, begin_report, bench_device, compare, dtype_names, summary
from moe_llava.perf.options import BenchError
from moe_llava.perf.rivals import RIVALS, RivalMlp, rivals_of
from moe_llava.perf.running import show_cases

SPARSE, DENSE = "sparse", "dense"
CUT_VOCABULARY = 2092  # rows, as real/vocabulary.py leaves of Gemma's 262,144, which are most of the weights of a small model
LABELLED_SHARE = 0.25  # of the positions of a row, the last ones, have labels


@dataclass(frozen=True)
class ModelSize:
    """`rows` and `tokens` of a batch by default, with an image in every row. `attention`: the implementation."""

    what: str
    text: Callable[[], PreTrainedConfig]
    rows: int
    tokens: int
    moe_layers: str = "interval"
    attention: str = "sdpa"

    def config(self) -> MoeLlavaConfig:
        """Return a configuration with the small tower of the digits world; the last token of the vocabulary is the placeholder."""
        text = self.text()
        return MoeLlavaConfig(
            vision_config=CLIPVisionConfig.from_pretrained(WEIGHTS / "tower"),
            text_config=text,
            image_token_index=text.vocab_size - 1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_layers=self.moe_layers,
            tie_word_embeddings=text.tie_word_embeddings,
        )


def _llama(width: int, ffn_width: int, layers: int, heads: int, vocabulary: int) -> Callable[[], PreTrainedConfig]:
    return lambda: LlamaConfig(
        hidden_size=width, intermediate_size=ffn_width, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary
    )


def _gemma() -> PreTrainedConfig:
    return Gemma3TextConfig(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        vocab_size=CUT_VOCABULARY,
        tie_word_embeddings=True,
    )


def _qwen() -> PreTrainedConfig:
    return Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=8,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=CUT_VOCABULARY,
        tie_word_embeddings=True,
    )


SIZES = {  # the keys are MODEL_SIZES of options.py
    "tiny": ModelSize("2 layers of width 32", _llama(32, 48, 2, 2, 99), rows=2, tokens=48),
    # The recipe's attention: the backward pass of the fused one is slow on a CPU.
    "digits": ModelSize(
        "the recipe of the digits", lambda: LlamaConfig.from_pretrained(WEIGHTS / "language_model"), rows=32, tokens=64, attention="eager"
    ),
    "middle": ModelSize("8 layers of width 512", _llama(512, 1408, 8, 8, 32000), rows=2, tokens=256),
    "gemma": ModelSize("Gemma 3 270M, its vocabulary cut", _gemma, rows=2, tokens=256),
    # Four learners with AdamW's moments must fit into memory.
    "qwen": ModelSize("8 of the 24 layers of Qwen2.5 0.5B, its vocabulary cut", _qwen, rows=2, tokens=256),
    "wide": ModelSize("2 layers of width 64, and a vocabulary of 151,936", _llama(64, 128, 2, 2, 151936), rows=1, tokens=2048),
    "phi2": ModelSize(
        "2 layers of Phi-2, both sparse",
        lambda: PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=2, num_attention_heads=32, vocab_size=51200),
        rows=2,
        tokens=2048,
        moe_layers="all",
    ),
}


def build(config: SparseConfig, name: str, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
    """Return, in evaluation mode, the model SPARSE, or one of transformers' own class: its partner DENSE, or a rival, by its name in
    RIVALS."""
    torch.manual_seed(0)
    dense_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config.dense_class]
    with torch.device(device):
        if name == SPARSE:
            model = sparse_class(dense_class)._from_config(copy.deepcopy(config), dtype=dtype)
        else:
            model = dense_class._from_config(_embeddable(config.dense_config()), dtype=dtype)
    if name == DENSE:
        _widen(find_backbone(model)[1], config)
    elif name in RIVALS:
        _exchange(model, build(config, SPARSE, dtype, device), RIVALS[name])
    model.set_attn_implementation(attention)
    return model.eval()


def _exchange(model: Any, sparse: Any, rival: Callable[[SparseMlp], nn.Module]) -> None:
    """Give a dense model the weights of `sparse`, and another implementation of its sparse layers, which shares their weights."""
    model.load_state_dict(sparse.state_dict(), strict=False)  # all but the FFNs of these layers
    for index, mlp in sparse.sparse_mlps().items():
        find_backbone(model)[1].layers[index].mlp = RivalMlp(rival(mlp))


def checked_rivals(size: ModelSize, device: torch.device) -> tuple[list[str], list[str]]:
    """Return (names of the rivals of a model, notes on those left out).

    Raise BenchError if the logits or the output of a sparse layer differ from those of the sparse model, in float32: only models that
    compute the same are compared. Logits alone would not do, as the FFNs of a random model contribute little to them.
    """
    config = size.config()
    names, notes = rivals_of(build(config, SPARSE, torch.float32, torch.device("meta")).sparse_mlps()[config.moe_layer_indices[0]])
    expected = _outputs(build(config, SPARSE, torch.float32, device, size.attention), config)
    for name in names:
        got = _outputs(build(config, name, torch.float32, device, size.attention), config)
        error, allowed = max(relative(one, other.double()) for one, other in zip(got, expected, strict=True)), TOLERANCE[torch.float32]
        if error > allowed:
            raise BenchError(f"{size.what}: with {name} a layer's output or the logits are {error:.1e} off (allowed: {allowed:.0e})")
    return names, notes


@torch.no_grad()
def _outputs(model: Any, config: SparseConfig) -> list[Tensor]:
    """Return the outputs of the sparse layers for a short row, and its logits."""
    found: list[Tensor] = []
    for index in config.moe_layer_indices:
        find_backbone(model)[1].layers[index].mlp.register_forward_hook(lambda mlp, inputs, y_BSD: found.append(y_BSD))
    logits = model(**batch_of(model, 1, CHECKED_TOKENS)).logits
    return [*found, logits]


def _embeddable(config: Any) -> Any:
    """Replace a placeholder of images beyond the vocabulary, which only sparse models can have, by the vocabulary's last token."""
    config.image_token_id = min(config.image_token_id, config.get_text_config().vocab_size - 1)
    return config


def _widen(backbone: Any, config: SparseConfig) -> None:
    """Make the FFN of each layer that is sparse in the partner as wide as a token's experts together, shared ones too. The values do not
    matter."""
    for index in config.moe_layer_indices:
        ffn = backbone.layers[index].mlp
        form, width = form_of(ffn), ffn.get_parameter(form_of(ffn).stacked["down_proj"][0]).shape[1]
        shared = [narrowed(ffn, config.num_shared_experts * width // config.granularity)] if config.num_shared_experts else []
        for name in form.dense_names:
            weights = [ffn.get_parameter(name)] * config.num_experts_per_tok + [part.get_parameter(name) for part in shared]
            narrow = weights[0].dim() - 1 if name in form.stacked["down_proj"] else 0  # the dimension of the FFN's width
            if name not in form.stacked.get("down_proj_bias", ()):
                set_parameter(ffn, name, torch.cat(weights, narrow))


def image_tokens(model: LlavaForConditionalGeneration) -> int:
    vision: Any = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def batch_of(model: LlavaForConditionalGeneration, rows: int, tokens: int) -> dict[str, Tensor]:
    """Return `rows` of `tokens`, an image and random text, on the model's device.

    Raise BenchError if a row has no room for an image and a token of text.
    """
    config: Any = model.config
    vision, image = config.vision_config, image_tokens(model)
    if rows < 1 or tokens <= image:
        raise BenchError(f"a batch of {rows} rows of {tokens} tokens, but it needs 1 and {image + 1}: an image takes {image}")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, config.text_config.vocab_size - 1, (rows, tokens), generator=generator)
    ids = torch.where(ids == config.image_token_id, 2, ids)
    ids[:, :image] = config.image_token_id
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """Return labels for the last LABELLED_SHARE of each row."""
    labels = batch["input_ids"].clone()
    labels[:, : round(labels.shape[1] * (1 - LABELLED_SHARE))] = -100
    return labels


def bench_model(
    names: Sequence[str], dtypes: Sequence[torch.dtype], rows: int | None, tokens: int | None, rounds: int, console: Console
) -> dict[str, Any]:
    """Measure the prefill of every size, a key of SIZES, in every dtype. `rows` and `tokens` of a batch: default the size's.

    Raise BenchError as `batch_of` and `checked_rivals` do.
    """
    device = bench_device()
    report = begin_report("model", device, dtype_names(*dtypes), rounds)
    with show_cases(report, len(names) * len(dtypes), console) as running:
        for name in names:
            size = SIZES[name]
            shape = rows or size.rows, tokens or size.tokens
            rivals = add_notes(report, checked_rivals(size, device))
            for dtype in dtypes:
                running.begin({"size": name, "rows": shape[0], "tokens": shape[1], "dtype": dtype_names(dtype)})
                calls: dict[str, Callable[[], object]] = {}
                for which in (DENSE, SPARSE, *rivals):
                    model = build(size.config(), which, dtype, device, size.attention)
                    calls[which] = partial(_prefill, model, batch_of(model, *shape))
                running.end(DENSE, summary(compare(calls, rounds, device, running), DENSE, device))
    return report


@torch.no_grad()
def _prefill(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Compute the logits of the last position only, as generation does."""
    model(**batch, logits_to_keep=1)
