"""How the FFN of each language model family maps onto stacked experts. This table is all the package knows of families.

A family is covered if its decoder layers keep their FFN in `layer.mlp` and that module's parameters are those of a row: llama, mistral,
qwen2, qwen3, stablelm and gemma are `GATED`, phi (1, 1.5 and 2) is `PLAIN`, phi3 and glm4 are `FUSED`. To add a family with other
parameter names, add a row: docs/customising.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration import MoeLlavaConfig
from .moe import Experts, GatedExperts, PlainExperts, Router, SparseMlp
from .smoes import ModalityStatistics

MAX_DIFFERENCE = 0.02  # relative, of an expert from its FFN: more than the roundings of a model in half precision


@dataclass(frozen=True)
class FfnForm:
    """One way to write an FFN.

    `stacked`: parameter of the experts class -> the dense parameters that one expert's slice of it is made of, joined along the output
    dimension; `down_proj`, [width, FFN width], is among them and tells the sizes. `activation`: the attribute of the dense module that
    holds its activation.
    """

    experts: type[Experts]
    stacked: dict[str, tuple[str, ...]]
    activation: str

    @property
    def dense_names(self) -> set[str]:
        return {name for names in self.stacked.values() for name in names}


GATED = FfnForm(
    experts=GatedExperts,
    stacked={"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)},
    activation="act_fn",
)
FUSED = FfnForm(
    experts=GatedExperts,
    stacked={"gate_up_proj": ("gate_up_proj.weight",), "down_proj": ("down_proj.weight",)},
    activation="activation_fn",
)
PLAIN = FfnForm(
    experts=PlainExperts,
    stacked={
        "up_proj": ("fc1.weight",),
        "up_proj_bias": ("fc1.bias",),
        "down_proj": ("fc2.weight",),
        "down_proj_bias": ("fc2.bias",),
    },
    activation="activation_fn",
)
FFN_FORMS = [GATED, PLAIN, FUSED]


def find_form(layer: nn.Module) -> FfnForm:
    """The row of the table that describes `layer.mlp`.

    Raises ValueError, naming what was found instead, if `layer` has no such module or the table no such row.
    """
    ffn = getattr(layer, "mlp", None)
    if not isinstance(ffn, nn.Module):
        found = ", ".join(name for name, _ in layer.named_children())
        raise ValueError(f"{type(layer).__name__} has no module 'mlp' that experts could replace; its modules are: {found}")
    return form_of(ffn)


def form_of(ffn: nn.Module) -> FfnForm:
    """The row of the table that describes `ffn`.

    Raises ValueError, naming its parameters and where to add a row, if there is none.
    """
    names = {name for name, _ in ffn.named_parameters()}
    for form in FFN_FORMS:
        if names == form.dense_names and hasattr(ffn, form.activation):
            return form
    raise ValueError(
        f"no row of FFN_FORMS in moe_llava/model/ffn.py describes {type(ffn).__name__}, whose parameters are: {', '.join(sorted(names))}. "
        "Add a row that maps them onto stacked experts: docs/customising.md"
    )


def sparse_mlp(config: MoeLlavaConfig, layer: nn.Module) -> SparseMlp:
    """An uninitialised SparseMlp for the place of `layer.mlp`, on its device and in its dtype."""
    form = find_form(layer)
    ffn = layer.get_submodule("mlp")
    down = ffn.get_parameter(form.stacked["down_proj"][0])
    width, ffn_width = down.shape
    with torch.device(down.device):
        sparse = SparseMlp(
            Router(config, width),
            form.experts(config, width, ffn_width, getattr(ffn, form.activation)),
            ffn if config.use_residual else None,
            ModalityStatistics(config, width) if config.routing == "smoes" else None,
        )
    return sparse.to(down.dtype)


@torch.no_grad()
def copy_into_experts(ffn: nn.Module, experts: Experts) -> None:
    """Fills every expert with the weights of the dense `ffn`.

    Raises ValueError if no row of the table describes `ffn`, or if an expert then computes something else: two families may call their
    parameters the same and use them differently.
    """
    for name, parts in form_of(ffn).stacked.items():
        one_expert: Tensor = torch.cat([ffn.get_parameter(part) for part in parts])
        experts.get_parameter(name).copy_(one_expert.expand(experts.num_experts, *one_expert.shape))
    down = experts.get_parameter("down_proj")
    if down.is_meta:
        return
    x_ND = torch.linspace(-2, 2, 3 * experts.hidden_dim, device=down.device).sin().view(3, -1).to(down.dtype)
    training = ffn.training
    expected_ND = ffn.eval()(x_ND)
    ffn.train(training)
    first_expert_only = [len(x_ND)] + [0] * (experts.num_experts - 1)
    difference = (experts.apply_experts(x_ND, first_expert_only) - expected_ND).float().norm() / expected_ND.float().norm().clamp(min=1e-12)
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"{type(ffn).__name__} has the parameters of a row of FFN_FORMS in moe_llava/model/ffn.py, but computes something else "
            f"({difference:.1%} off): it needs a form of its own, docs/customising.md"
        )
