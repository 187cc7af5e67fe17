"""Configuration of a sparse LLaVA: a `LlavaConfig` and what makes it sparse."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig


class MoeLlavaConfig(LlavaConfig):
    """A LLaVA whose language model has experts in place of some feed-forward networks (FFN).

    Args:
        num_experts: experts E per MoE layer.
        num_experts_per_tok: experts k that each token goes through, 1 <= k <= E.
        moe_layers: the decoder layers that become sparse: "interval" (every other one, from layer 0; the paper's choice), "all",
            "first_half", "second_half", or a list of layer indices.
        norm_topk_prob: divide the k weights by their sum. True makes an upcycled model compute what its dense origin computed;
            False is equation 6 of the paper as printed.
        router_aux_loss_coef: alpha, weight of the balance loss (equation 7; 0.01 in the paper).
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5); 0 switches it off.
        output_router_logits: return router logits and auxiliary losses from every forward pass, as transformers' MoE models do.
            While training with labels the auxiliary losses are part of the loss whatever this says.
        capacity_factor: an expert accepts at most ceil(tokens * k / E * capacity_factor) tokens of a batch; those beyond get nothing from
            it. None drops no token.
        use_residual: keep the dense FFN beside the experts and let each token mix the two (residual MoE, arXiv 2201.05596).

    Raises ValueError, naming the field, its value and the rule, if the fields do not fit each other or the language model.
    """

    model_type = "moe_llava"

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: str | list[int] = "interval"
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    output_router_logits: bool = False
    capacity_factor: float | None = None
    use_residual: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # What a saved folder names beside the classes that are saved into it.
        kwargs.setdefault("auto_map", {"AutoModel": "modeling.MoeLlavaModel"})
        super().__post_init__(**kwargs)
        self.check_moe()

    def check_moe(self) -> None:
        """Raises ValueError as the class does. The model calls it too: `from_pretrained(..., num_experts_per_tok=1)` sets fields late."""
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}, but a MoE layer needs at least 1 expert")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}, but must lie in 1..num_experts={self.num_experts}")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor is {self.capacity_factor}, but it must be above 0, or None to drop no token")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but the weight of a loss must not be negative")
        self.moe_layer_indices  # noqa: B018  checks the placement against the number of layers

    @property
    def moe_layer_indices(self) -> list[int]:
        """`moe_layers` as sorted indices of decoder layers."""
        num_layers = self.text_config.num_hidden_layers
        if isinstance(self.moe_layers, str):
            return self._named_placement(num_layers)
        for index in self.moe_layers:
            if not 0 <= index < num_layers:
                raise ValueError(f"moe_layers names layer {index}, but the language model has layers 0..{num_layers - 1}")
        if not self.moe_layers or len(set(self.moe_layers)) != len(self.moe_layers):
            raise ValueError(f"moe_layers is {self.moe_layers}, but it must name at least one layer, and none twice")
        return sorted(self.moe_layers)

    def _named_placement(self, num_layers: int) -> list[int]:
        placements = {
            "interval": range(0, num_layers, 2),
            "all": range(num_layers),
            "first_half": range(num_layers // 2),
            "second_half": range(num_layers // 2, num_layers),
        }
        if self.moe_layers not in placements:
            raise ValueError(
                f"moe_layers is {self.moe_layers!r}, but it must be one of {', '.join(placements)}, or a list of layer indices"
            )
        if not placements[self.moe_layers]:
            raise ValueError(f"moe_layers is {self.moe_layers!r}, which names no layer of a language model with {num_layers}")
        return list(placements[self.moe_layers])
