"""The command line of vLLM for a checkpoint, and the memory of each device.

What was run and compared with `generate` is in docs/engines.md. The rules here refuse what vLLM's backend for transformers models computes
otherwise, without an error.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_llava.checkpoints.files import EXPORT_FIELD, SPARSE, read_config
from moe_llava.common.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from moe_llava.training.budget import Budget

# Families that vLLM's backend for transformers models computes otherwise, or does not start.
UNSUPPORTED = {
    "qwen3_vl": "because it drops the deepstack features of the vision tower",
    "qwen3_5": "because it has no linear attention",
    "gemma3": "because it drops the token types, by which the tokens of an image attend to each other in both directions",
    "paligemma": "because it drops the token types, by which a prompt attends in both directions",
    "smolvlm": "because their processor cannot count the tokens of an image",
    "ovis2": "because their processor cannot count the tokens of an image",
}
EXPORTED = {"qwen3_vl", "qwen3_5"}  # those with a native architecture


@dataclass(frozen=True)
class Layout:
    """How a model is divided among devices. With `expert_parallel`, each device holds whole experts, of all copies together."""

    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    nodes: int = 1

    def problem(self) -> str | None:
        """Return what does not fit, or None."""
        if self.nodes > 1 and (self.tensor_parallel * self.data_parallel) % self.nodes:
            return f"--nodes is {self.nodes}, but must divide {self.tensor_parallel * self.data_parallel} devices"
        return None

    def problem_with(self, heads: int) -> str | None:
        """Return why vLLM cannot divide the attention heads of the language model among devices, or None."""
        if heads % self.tensor_parallel:
            return f"--tensor-parallel is {self.tensor_parallel}, but must divide the {heads} attention heads of the language model"
        return None


def vllm_command(path: str | Path, layout: Layout) -> str:
    """Return the command line. Raise CheckpointError, naming the reason, if vLLM computes something other than `generate` does."""
    config = read_config(path)
    words = ["vllm", "serve", str(path)]
    if str(config.get("model_type")).startswith(SPARSE):
        _check(config, path)
        if config.get("routing") != "modality_split":
            words += ["--model-impl", "transformers", "--trust-remote-code"]
    elif EXPORT_FIELD not in config:
        raise CheckpointError(f"checkpoint {path} is neither sparse nor an export of `moe-llava export`")
    for option, value in {"--tensor-parallel-size": layout.tensor_parallel, "--data-parallel-size": layout.data_parallel}.items():
        words += [option, str(value)] if value > 1 else []
    words += ["--enable-expert-parallel"] if layout.expert_parallel else []
    words += ["--distributed-executor-backend", "ray"] if layout.nodes > 1 else []
    return shlex.join(words)


def _check(config: dict[str, Any], path: str | Path) -> None:
    family = config["model_type"].removeprefix(SPARSE)
    if family in UNSUPPORTED:
        advice = "export it: `moe-llava export`" if family in EXPORTED else "use `moe-llava serve`"
        raise CheckpointError(
            f"checkpoint {path}: vLLM's backend does not support models of type {family}, {UNSUPPORTED[family]}; {advice}"
        )
    if config.get("capacity_factor") is not None:
        raise CheckpointError(
            f"checkpoint {path} has capacity_factor {config['capacity_factor']}: the tokens of a batch share it, and vLLM batches requests "
            "as they come"
        )
    if config.get("moe_in", ["language_model"]) != ["language_model"]:
        raise CheckpointError(f"checkpoint {path} has moe_in {config['moe_in']}: vLLM serves experts in the language model alone")


def device_bytes(budget: Budget, config: PreTrainedConfig, layout: Layout, dtype_bytes: int = 2) -> tuple[int, int]:
    """Return (weights, cache of a token) of each device in bytes, computed: experts and language model are divided, the tower is not. A
    device has at least one head of keys and values."""
    whole = budget.total["tower"] + budget.total["projector"]
    experts = budget.total["experts"]
    others = sum(budget.total.values()) - whole - experts
    shares = layout.tensor_parallel * (layout.data_parallel if layout.expert_parallel else 1)
    weights = whole + others / layout.tensor_parallel + experts / shares
    text: Any = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return round(weights * dtype_bytes), round(budget.cache_bytes / min(layout.tensor_parallel, heads))
