"""Speed of a sparse model against the share of its experts that memory has room for.

The variants take turns, and each reads the same prompt and the same random continuation: so a guess at the next experts cannot gain by
repetition. `cold`: an expert that is not kept comes from the disk each time, as when memory has no room for the file either; otherwise
it comes from the page cache of the system.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig

from moe_llava.checkpoints.load import load_config
from moe_llava.checkpoints.offload import Counts, ExpertCache, FileStack, offload_experts
from moe_llava.checkpoints.weights import shape_bytes
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration

CPU = torch.device("cpu")


class ColdStack(FileStack):
    """What was read leaves the system's cache."""

    def read(self, expert: int, out: torch.Tensor) -> None:
        super().read(expert, out)
        os.posix_fadvise(self.descriptor, self.begin(expert), shape_bytes(*self.form), os.POSIX_FADV_DONTNEED)


def measure(
    folder: Path, shares: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0), prompt: int = 64, tokens: int = 32, rounds: int = 3
) -> dict[str, Any]:
    """Tokens per second, medians over rounds, for each share: fetching ahead or not, cold or not; and relative to the model in memory.

    Args:
        folder: a sparse checkpoint.
        prompt: tokens that are read at once.
        tokens: that are written after them, one at a time.
    """
    config = load_config(folder)
    generator = torch.Generator().manual_seed(0)
    ids_S = torch.randint(3, config.text_config.vocab_size, (prompt + tokens,), generator=generator)
    ids_S[ids_S == config.image_token_id] = 3
    whole = MoeLlavaForConditionalGeneration.from_pretrained(folder)
    whole.set_experts_implementation("eager")
    curve = [point for share in shares for point in _measure_share(whole, folder, share, ids_S, prompt, rounds)]
    return {"experts_gb": _expert_bytes(whole) / 1e9, "curve": curve}


def _measure_share(whole: Any, folder: Path, share: float, ids_S: torch.Tensor, prompt: int, rounds: int) -> list[dict[str, Any]]:
    """The whole model takes its turn too: `relative` is to it."""
    variants = [_variant(folder, share, ahead, cold) for ahead in (True, False) for cold in (True, False)]
    times: list[list[tuple[float, float]]] = [[] for _ in (whole, *variants)]
    for _ in range(rounds):
        times[0].append(_time(whole, ids_S, prompt))
        for own, (_, model, cache) in zip(times[1:], variants, strict=True):
            cache.counts = Counts()
            own.append(_time(model, ids_S, prompt))
    reference = _speeds(times[0], prompt, len(ids_S))
    points = []
    for own, (settings, _, cache) in zip(times[1:], variants, strict=True):
        speeds = _speeds(own, prompt, len(ids_S))
        relative = {name: speeds[name] / reference[name] for name in speeds}
        points.append(settings | speeds | {"relative": relative, "last_round": asdict(cache.counts)})
    return points


def _variant(folder: Path, share: float, ahead: bool, cold: bool) -> tuple[dict[str, Any], Any, ExpertCache]:
    model = MoeLlavaForConditionalGeneration.from_pretrained(folder)
    cache = offload_experts(model, share, CPU, folder)
    if not ahead:
        cache.likely = 1.0
    if cold:
        cache.stacks = [{name: ColdStack(**vars(stack)) for name, stack in layer.items()} for layer in cache.stacks]
    return {"share": share, "ahead": ahead, "cold": cold}, model, cache


@torch.inference_mode()
def _time(model: Any, ids_S: torch.Tensor, prompt: int) -> tuple[float, float]:
    """Seconds for the prompt, and for what comes after it."""
    cache = DynamicCache()
    begin = time.perf_counter()
    model(input_ids=ids_S[None, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    for token in ids_S[prompt:]:
        model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
    return read - begin, time.perf_counter() - read


def _speeds(times: list[tuple[float, float]], prompt: int, total: int) -> dict[str, float]:
    return {
        "prompt_tokens_per_second": prompt / median(read for read, _ in times),
        "tokens_per_second": (total - prompt) / median(written for _, written in times),
    }


def _expert_bytes(model: MoeLlavaForConditionalGeneration) -> int:
    return sum(parameter.nbytes for mlp in model.model.sparse_mlps().values() for parameter in mlp.experts.parameters())


def random_checkpoint(
    folder: Path,
    alike: bool,
    width: int = 1024,
    ffn_width: int = 2048,
    layers: int = 16,
    experts: int = 8,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Saves a random sparse model of the llama family, with experts in every other layer. Its routers tell nothing of each other: that is
    the worst case for a guess. `alike`: all layers have the same router, and a token keeps most of its experts from layer to layer: that
    is the best case."""
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    config = MoeLlavaConfig(vision_config=vision, text_config=text, num_experts=experts, image_token_index=999)
    torch.manual_seed(0)
    model = MoeLlavaForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        # As large as what layers add: a token's state changes little from layer to layer.
        model.get_input_embeddings().weight.normal_()
        mlps = list(model.model.sparse_mlps().values())
        for mlp in mlps[1:] if alike else ():
            mlp.router.weight.copy_(mlps[0].router.weight)
    model.save_pretrained(folder)
