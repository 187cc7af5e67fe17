"""Speed of a sparse model against the share of its experts that memory has room for.

The variants read the same prompt and take turns at every token after it; the tokens are random, so that a guess at the next experts cannot
gain by repetition. A turn ends when nothing is being read any more. `cold`: an expert that is not kept comes from the disk each time, as
when memory has no room for the file either; otherwise it comes from the system's cache of files.
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
from moe_llava.checkpoints.weights import find_weights, read_tables, shape_bytes
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration

CPU = torch.device("cpu")
AHEAD = (True, False)


class ColdStack(FileStack):
    """What was read leaves the system's cache."""

    def read(self, expert: int, out: torch.Tensor) -> None:
        super().read(expert, out)
        os.posix_fadvise(self.descriptor, self.begin(expert), shape_bytes(*self.form), os.POSIX_FADV_DONTNEED)


class Runner:
    """A model that reads token after token, and how long each pass took, in seconds. `experts`: None if all are in memory."""

    def __init__(self, model: Any, experts: ExpertCache | None = None):
        self.model = model
        self.experts = experts
        self.seconds: list[float] = []
        self._past = DynamicCache()

    @torch.inference_mode()
    def read(self, ids_S: torch.Tensor) -> None:
        begin = time.perf_counter()
        self.model(input_ids=ids_S[None], past_key_values=self._past, use_cache=True, logits_to_keep=1)
        if self.experts is not None:
            self.experts.settle()
        self.seconds.append(time.perf_counter() - begin)

    def begin(self) -> None:
        self.seconds, self._past = [], DynamicCache()
        if self.experts is not None:
            self.experts.counts = Counts()


def measure(folder: Path, shares: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0), prompt: int = 64, tokens: int = 32) -> dict[str, Any]:
    """For each share, fetching ahead or not, cold or not: tokens per second of the prompt, and of what is written after it (by the median
    token); both also `relative` to the model in memory, which takes its turns too; and what was counted.

    Args:
        folder: a sparse checkpoint.
        prompt: tokens that are read at once. They are read twice, and the second time counts.
        tokens: that are written after them, one at a time.
    """
    config = load_config(folder)
    ids_S = torch.randint(3, config.text_config.vocab_size, (prompt + tokens,), generator=torch.Generator().manual_seed(0))
    ids_S[ids_S == config.image_token_id] = 3
    whole = Runner(_whole(folder))
    size = sum(parameter.nbytes for mlp in whole.model.model.sparse_mlps().values() for parameter in mlp.experts.parameters())
    cases = [(share, cold) for share in shares for cold in (False, True)]
    return {"expert_bytes": size, "curve": [point for share, cold in cases for point in _points(whole, folder, share, cold, ids_S, prompt)]}


def _points(whole: Runner, folder: Path, share: float, cold: bool, ids_S: torch.Tensor, prompt: int) -> list[dict[str, Any]]:
    """Cold ones by themselves: what others leave in the system's cache would warm them."""
    runners = [whole, *(_offloaded(folder, share, ahead, cold) for ahead in AHEAD)]
    for _ in range(2):
        for runner in runners:
            runner.begin()
            runner.read(ids_S[:prompt])
    for token in ids_S[prompt:, None]:
        for runner in runners:
            runner.read(token)
    reference = _speeds(whole, prompt)
    points = []
    for ahead, runner in zip(AHEAD, runners[1:], strict=True):
        assert runner.experts is not None
        speeds = _speeds(runner, prompt)
        relative = {name: speed / reference[name] for name, speed in speeds.items()}
        counts = asdict(runner.experts.counts)
        points.append({"share": share, "cold": cold, "ahead": ahead, **speeds, "relative": relative, "counts": counts})
    return points


def _speeds(runner: Runner, prompt: int) -> dict[str, float]:
    return {"prompt_tokens_per_second": prompt / runner.seconds[0], "tokens_per_second": 1 / median(runner.seconds[1:])}


def _load(folder: Path) -> MoeLlavaForConditionalGeneration:
    model = MoeLlavaForConditionalGeneration.from_pretrained(folder)
    model.set_experts_implementation("eager")
    return model


def _whole(folder: Path) -> MoeLlavaForConditionalGeneration:
    """Its experts are read, not mapped: pages that somebody maps would stay in the system's cache, and nothing be cold."""
    model, tables = _load(folder), read_tables(find_weights(folder))
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            tables[name].read_into(values)
            parameter.data = values
    return model


def _offloaded(folder: Path, share: float, ahead: bool, cold: bool) -> Runner:
    model = _load(folder)
    cache = offload_experts(model, share, CPU, folder)
    if not ahead:
        cache.likely = 1.0
    if cold:
        cache.stacks = [{name: ColdStack(**vars(stack)) for name, stack in layer.items()} for layer in cache.stacks]
    return Runner(model, cache)


def random_checkpoint(folder: Path, alike: bool, width: int = 1024, ffn_width: int = 2048, layers: int = 16, experts: int = 8) -> None:
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
    model = MoeLlavaForConditionalGeneration(config)
    with torch.no_grad():
        # As large as what layers add: a token's state changes little from layer to layer.
        model.get_input_embeddings().weight.normal_()
        mlps = list(model.model.sparse_mlps().values())
        for mlp in mlps[1:] if alike else ():
            mlp.router.weight.copy_(mlps[0].router.weight)
    model.save_pretrained(folder)
