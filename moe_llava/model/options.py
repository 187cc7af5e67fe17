"""The options that make a model sparse: name, type, default, description and bounds of each, defined here once.

Imports the standard library only, so that recipes and the command line can check options before torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

PLACEMENTS = ("interval", "all", "first_half", "second_half")
ROUTINGS = ("agnostic", "modality_split", "smoes")
BALANCED = ("step", "process", "sequence")
PARTS = ("language_model", "projector", "vision_tower")

# By the annotation of an option: its types, those of the items of a list, and the rule. A bool is no number here, though Python counts it
# as one.
_KINDS: dict[Any, tuple[tuple[type, ...], tuple[type, ...], str]] = {
    "int": ((int,), (), "must be a whole number"),
    "float": ((int, float), (), "must be a number"),
    "float | None": ((int, float), (), "must be a number, or null"),
    "bool": ((bool,), (), "must be true or false"),
    "str": ((str,), (), "must be a name"),
    "list[str]": ((list,), (str,), "must be a list of names"),
    "str | list[int]": ((str, list), (int,), "must be a name, or a list of layer indices"),
}


def _distinct(names: list[Any]) -> bool:
    """Return whether there is a name, and none twice."""
    return 0 < len(set(names)) == len(names)


def _is_any(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _option(default: Any, description: str, **bounds: Any) -> Any:
    """Return a field of MoeOptions. Bounds are a `minimum`, an exclusive minimum (`above`) or `choices`."""
    metadata = {"description": description, **bounds}
    return (
        field(default_factory=default.copy, metadata=metadata) if isinstance(default, list) else field(default=default, metadata=metadata)
    )


@dataclass
class MoeOptions:
    """The options of `upcycle`, `MoeLlavaConfig`, the section `moe` of a recipe and `moe-llava upcycle`.

    E: experts of a MoE layer; k: experts that a token uses. Equations: arXiv 2401.15947, unless another paper is named. None is in
    bounds where it is the default.
    """

    num_experts: int = _option(4, "experts E in each MoE layer", minimum=1)
    num_experts_per_tok: int = _option(2, "experts k that each token uses, 1 <= k <= E", minimum=1)
    moe_layers: str | list[int] = _option(  # noqa: RUF009  it returns a field
        "interval",
        "decoder layers that become sparse: interval (every other one, from layer 0, as in the paper), all, first_half, second_half, "
        "or layer indices",
    )
    moe_in: list[str] = _option(  # noqa: RUF009
        ["language_model"],
        "parts of the model whose FFNs become experts: language_model, projector, vision_tower; the names of moe_layers apply to the "
        "tower's layers, too (CuMo, arXiv 2405.05949)",
    )
    granularity: int = _option(
        1,
        "cut each FFN along its width into G parts: E * G experts, of which a token uses k * G, for the same FLOPs (arXiv 2410.07524)",
        minimum=1,
    )
    num_shared_experts: int = _option(
        0,
        "experts that every token uses beside those that the router chooses, each as wide as one of these; at most G (DeepSeekMoE, "
        "arXiv 2401.06066)",
        minimum=0,
    )
    norm_topk_prob: bool = _option(
        True,
        "divide the k router weights by their sum; true makes an upcycled model compute what its dense origin computes, false is "
        "equation 6 as printed",
    )
    router_aux_loss_coef: float = _option(0.01, "weight alpha of the balance loss (equation 7)", minimum=0)
    balance_over: str = _option(
        "step",
        "tokens over which the balance loss compares load and probability: step (the micro batches that all processes compute at once, "
        "arXiv 2501.11873), process (each its own), or sequence (each row by itself, arXiv 2412.19437, equation 17)",
        choices=BALANCED,
    )
    router_bias_rate: float = _option(
        0.0,
        "step u of a bias that is added to the probabilities of experts in the selection, and that moves towards an even load after "
        "each training step (arXiv 2408.15664); 0: no bias",
        minimum=0,
    )
    router_z_loss_coef: float = _option(0.0, "weight of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5); 0 disables it", minimum=0)
    capacity_factor: float | None = _option(
        None,
        "an expert computes at most ceil(tokens * k / E * capacity_factor) tokens of a batch and drops the rest; without it none is "
        "dropped",
        above=0,
    )
    use_residual: bool = _option(
        False, "keep the dense FFN beside the experts and let each token mix both (residual MoE, arXiv 2201.05596)"
    )
    routing: str = _option(
        "agnostic",
        "use of a token's modality: agnostic (none), modality_split (image tokens choose among the first half of the experts, text "
        "tokens among the second), or smoes (guidance by a loss, arXiv 2604.23996); the last two balance the load within each half or "
        "bin",
        choices=ROUTINGS,
    )
    expert_bin_size: int = _option(2, "experts per bin, N_B of SMoES; there must be two bins or more", minimum=1)
    router_mi_loss_coef: float = _option(
        1e-4, "weight of the mutual information loss of SMoES, whose paper combines 1e-4 with router_aux_loss_coef 1e-3", minimum=0
    )

    def moe_problems(self) -> list[str]:
        """Return a sentence for each option that is out of bounds, or if none is, for each that does not fit the others, with its name, its
        value and the rule."""
        broken = [(f.name, rule) for f in fields(MoeOptions) if (rule := self._broken_bound(f))] or self._broken_rules()
        return [f"{name} is {getattr(self, name)!r}, but {rule}" for name, rule in broken]

    def _broken_rules(self) -> Iterator[tuple[str, str]]:
        """Yield (option, rule) for each rule between options, all within their bounds, that is broken."""
        experts, used, parts, routing = self.num_experts, self.num_experts_per_tok, self.moe_in, self.routing
        if used > experts:
            yield "num_experts_per_tok", f"must lie in 1..num_experts={experts}"
        if self.num_shared_experts > self.granularity:
            yield "num_shared_experts", f"must be at most granularity={self.granularity}: shared experts begin as parts of one FFN"
        if self.num_shared_experts and self.use_residual:
            yield "use_residual", "there are shared experts, too: a layer has one of them"
        if isinstance(self.moe_layers, str):
            if self.moe_layers not in PLACEMENTS:
                yield "moe_layers", f"must be one of {', '.join(PLACEMENTS)}, or a list of layer indices"
        elif not _distinct(self.moe_layers):
            yield "moe_layers", "must name at least one layer, and none twice"
        elif "vision_tower" in parts:
            rule = f"indices mean layers of the language model: with vision_tower in moe_in it must be one of {', '.join(PLACEMENTS)}"
            yield "moe_layers", rule
        if not _distinct(parts) or not set(parts) <= set(PARTS):
            yield "moe_in", f"must name some of {', '.join(PARTS)}, each once"
        elif parts != ["language_model"] and routing != "agnostic":
            yield "moe_in", f"must be ['language_model'] for routing {routing}: what a tower sees has one modality"
        if routing == "modality_split" and experts % 2:
            yield "num_experts", "must be even for routing modality_split, which gives each modality half of them"
        elif routing == "modality_split" and used > experts // 2:
            rule = f"must lie in 1..{experts // 2} for routing modality_split: half of num_experts={experts}"
            yield "num_experts_per_tok", rule
        routed, size = self.experts_per_layer, self.expert_bin_size
        if routing == "smoes" and (routed % size or routed < 2 * size):
            yield "expert_bin_size", f"must divide the {routed} experts of a layer into two or more equal bins for routing smoes"

    def _broken_bound(self, f: Any) -> str | None:
        value, bounds = getattr(self, f.name), f.metadata
        if value is None and f.default is None:
            return None
        kinds, of_items, rule = _KINDS[f.type]
        items = value if isinstance(value, list) else []
        if not _is_any(value, kinds) or not all(_is_any(item, of_items) for item in items):
            return rule
        if "choices" in bounds and value not in bounds["choices"]:
            return f"must be one of {', '.join(bounds['choices'])}"
        if {"minimum", "above"} & bounds.keys() and not math.isfinite(value):
            return "must be finite"
        if "minimum" in bounds and value < bounds["minimum"]:
            return f"must be at least {bounds['minimum']}"
        if "above" in bounds and value <= bounds["above"]:
            return f"must be above {bounds['above']}"
        return None

    @property
    def experts_per_layer(self) -> int:
        """Experts that the router of a layer chooses from: E * G."""
        return self.num_experts * self.granularity

    @property
    def experts_per_token(self) -> int:
        """Experts that it chooses for a token: k * G."""
        return self.num_experts_per_tok * self.granularity

    def sparse_layers(self, num_layers: int, part: str = "language model") -> list[int]:
        """Return the sorted indices of the layers that `moe_layers` means in a part of the model with `num_layers`. Raise ValueError if it
        names none, or one that is not there."""
        placements = {
            "interval": range(0, num_layers, 2),
            "all": range(num_layers),
            "first_half": range(num_layers // 2),
            "second_half": range(num_layers // 2, num_layers),
        }
        named = placements[self.moe_layers] if isinstance(self.moe_layers, str) else self.moe_layers
        for index in named:
            if not 0 <= index < num_layers:
                raise ValueError(f"moe_layers names layer {index}, but the {part} has layers 0..{num_layers - 1}")
        if not named:
            raise ValueError(f"moe_layers is {self.moe_layers!r}, which names no layer of a {part} with {num_layers}")
        return sorted(named)
