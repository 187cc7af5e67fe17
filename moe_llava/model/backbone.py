"""What every sparse model has, with or without a language modelling head: experts in the place of FFNs, masks for their routers, and the
routers' outputs, recorded in each SparseMlp, because the wrappers around a backbone return only the fields that they know.

Shapes: B batch, S sequence, T = B * S tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import torch_compilable_check
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .balance import LoadBias, sum_over_processes
from .configuration import SparseConfig
from .ffn import sparse_mlp
from .greedy import placeholder_ids
from .moe import Experts, GatedExperts, SparseMlp, activation_name, check_sonicmoe, init_sparse_weights
from .outputs import VISION, extended
from .places import ffn_names, find_backbone, vision_ffns
from .smoes import ModalityStatistics

VISUAL = ("pixel_values", "image_", "video_", "mm_encoder_outputs")  # how arguments with images begin
MOST_NAMED = 20  # missing weights in an error message
FRESH = (".mlp.statistics.", ".router.load_bias.")  # parts of the names of buffers that may be missing, because they start at zero


@dataclass
class Request:
    """Share the head's needs and the backbone's results between the two: the family's code between them drops unknown arguments.

    `record`: keep the routers' outputs. `token_mask`: [B, S], 0 for padding, instead of the attention mask. `image_mask`: [B, S] or [T]
    bool, the tokens of images, instead of the placeholders in input_ids. `rows`: [B, S] bool, the positions whose hidden states the head
    needs; None for all. Results: `recorded`, the routers' outputs per MoE layer by name; `token_mask_T`, bool, False for padding.
    """

    record: bool
    token_mask: Tensor | None = None
    image_mask: Tensor | None = None
    rows: Tensor | None = None
    recorded: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    token_mask_T: Tensor | None = None


def real_tokens(inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor | None:
    """Return [T] bool, False for padding, for the tokens of this pass; None without a 2-D mask. In decoding the mask also covers the cached
    positions, which come first."""
    mask = inputs.get("attention_mask") if token_mask is None else token_mask
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None  # generation with a static cache passes 4-D masks, one per layer type
    return mask[:, -tokens_of(inputs).shape[1] :].reshape(-1).bool()


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Return the input that has a row for each row of the batch: token ids [B, S], or embeddings [B, S, D]."""
    return inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]


def without_placeholders(config: SparseConfig, module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Replace placeholders that have no row in the embedding table before it is read; image features replace the result."""
    ids, *others = arguments
    for token in placeholder_ids(config):
        if not 0 <= token < module.num_embeddings:
            ids = ids.masked_fill(ids == token, 0)
    return (ids, *others)


class SparseModel(PreTrainedModel):
    """Mixin of every sparse model, in front of the dense class."""

    dense_class: type[PreTrainedModel]
    accepts_loss_kwargs = True
    request: Request | None = None

    def __init__(self, config: SparseConfig, *args: Any, **kwargs: Any):
        config.check_moe()
        config.check_engine()
        # The family's constructor makes dense parts, which would reject a backend of experts.
        backend, config._experts_implementation_internal = config._experts_implementation, None
        super().__init__(config, *args, **kwargs)
        self.backbone_name = find_backbone(self)[0]
        self.vision_names = vision_ffns(self, config)
        for label, name in ffn_names(self, config).items():
            try:
                self.set_submodule(name, sparse_mlp(config, self.get_submodule(name)))
            except ValueError as error:
                raise ValueError(f"moe_in is {config.moe_in}, but {label}: {error}" if isinstance(label, str) else str(error)) from error
        if config.routing == "smoes":
            self._keep_in_fp32_modules_strict.add("statistics")  # transformers has made it a set
        if config.router_bias_rate:
            self._keep_in_fp32_modules_strict.add("load_bias")
        self.post_init()
        experts = next(iter(self.all_sparse_mlps().values())).experts
        # Expert parallelism of transformers, DistributedConfig(ep_size=...): each process holds whole experts and receives their tokens.
        plan = {f".{name}": "grouped_gemm" for name, _ in experts.named_parameters()} | {"": "ep_dispatch_experts"}
        if not config.separate_experts:
            self._ep_plan.update({f"{self.backbone_name}.layers.*.mlp.experts{name}": style for name, style in plan.items()})
        # Kernels read the activation of the experts from their configuration.
        config.hidden_act = activation_name(experts.act_fn)
        # Engines with their own kernels recognise experts by these saved fields. vLLM then assumes SiLU gating, so other experts do not
        # get them: it runs those with the code of this package.
        if isinstance(experts, GatedExperts) and config.hidden_act == "silu" and config.moe_in == ["language_model"]:
            config.add_engine_fields(moe_intermediate_size=experts.intermediate_dim)
        config._experts_implementation_internal = self.get_correct_experts_implementation(backend)
        config.add_training_fields()
        self.set_input_embeddings(self.get_input_embeddings())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint, and raise ValueError if weights are missing: transformers would initialise them at random.

        With `output_loading_info` return (model, report) instead, and leave the decision to the caller. Buffers of FRESH may be missing.
        """
        model, report = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, report
        missing = sorted(key for key in report["missing_keys"] if not any(part in key for part in FRESH))
        if missing and pretrained_model_name_or_path is not None:
            more = f", and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            raise ValueError(f"{pretrained_model_name_or_path} does not hold {', '.join(missing[:MOST_NAMED])}{more}")
        return model

    def initialize_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialise what no checkpoint fills. transformers leaves the modules of a backbone to its class, which does not know experts."""
        with torch.no_grad():
            for module in self.modules():
                init_sparse_weights(module, getattr(self.config.get_text_config(), "initializer_range", 0.02))
                if isinstance(module, ModalityStatistics | LoadBias):
                    module.reset()
        super().initialize_weights(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled model. transformers registers recordable outputs in the constructor, which does not run here."""
        super().__setstate__(state)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.dense_class._can_set_attn_implementation()  # transformers would look for attention in the module of the class

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for the decorator in the module of the class; the experts are in moe.py

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the backend of the experts; None means "auto". Raise ValueError if it is unknown or cannot compute them."""
        if self.config.separate_experts and requested_experts not in (None, "auto", "eager"):
            raise ValueError(
                f"experts_implementation {requested_experts!r} computes stacked experts, but separate_experts is true: use 'eager'"
            )
        if requested_experts == "sonicmoe":
            for experts in self.modules():
                if isinstance(experts, Experts):
                    check_sonicmoe(experts)
        return super().get_correct_experts_implementation("auto" if requested_experts is None else requested_experts)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Raise ValueError for use_reentrant=True, which silently drops the gradient of the routers' losses."""
        gradient_checkpointing_kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if gradient_checkpointing_kwargs["use_reentrant"]:
            raise ValueError("gradient checkpointing with use_reentrant=True gives the balance loss no gradient: use use_reentrant=False")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs, **kwargs)

    def set_input_embeddings(self, value: nn.Module) -> None:
        super().set_input_embeddings(value)
        value.register_forward_pre_hook(partial(without_placeholders, self.config))

    def sparse_mlps(self) -> dict[int, SparseMlp]:
        """Return the SparseMlp of each MoE layer of the language model by layer index."""
        layers = self.get_submodule(self.backbone_name).layers
        return {index: layers[index].mlp for index in self.config.moe_layer_indices}

    def vision_mlps(self) -> dict[str, SparseMlp]:
        """Return each SparseMlp outside the language model by its label: "tower 0", ..., "projector"."""
        found: Any = {label: self.get_submodule(name) for label, name in self.vision_names.items()}
        return found

    def all_sparse_mlps(self) -> dict[int | str, SparseMlp]:
        """Return `sparse_mlps` and `vision_mlps`."""
        return dict([*self.sparse_mlps().items(), *self.vision_mlps().items()])

    def expert_groups(self) -> list[Tensor] | None:
        """Return per MoE layer the groups [G, N] of experts to balance within: halves or bins; None if a layer is one group."""
        mlps = self.sparse_mlps().values()
        if self.config.routing == "agnostic":
            return None
        if self.config.routing == "modality_split":
            return [torch.arange(self.config.experts_per_layer).view(2, -1) for _ in mlps]
        return [mlp.statistics.bins() for mlp in mlps if mlp.statistics is not None]

    def update_statistics(self, modality_sums: tuple[Tensor, ...]) -> None:
        """Update the statistics of SMoES from the recorded sums of each MoE layer, added up over all processes."""
        sums = sum_over_processes(torch.stack([layer.to(modality_sums[0].device) for layer in modality_sums]))
        for mlp, layer in zip(self.sparse_mlps().values(), sums, strict=True):
            assert mlp.statistics is not None
            mlp.statistics.update(layer.to(mlp.statistics.mean.device))

    def update_router_bias(self) -> None:
        """Move the biases of the selection against the load since the last call. Call it after each step of the optimizer, in every
        process; without `router_bias_rate` it does nothing."""
        biases = [bias for mlp in self.all_sparse_mlps().values() if (bias := mlp.router.load_bias) is not None]
        if not biases:
            return
        device = biases[0].bias.device
        # A process whose batches have no images has counted no patches, but takes part in the sum.
        counts = [torch.zeros_like(bias.bias) if bias.counts is None else bias.counts for bias in biases]
        for bias, load_E in zip(biases, sum_over_processes(torch.stack([counts_E.to(device) for counts_E in counts])), strict=True):
            bias.update(load_E)

    def _sparse_forward(self, inputs: dict[str, Any]) -> Any:
        """Run the family's forward pass, and return the routers' outputs with its own if `output_router_logits` asks for them."""
        requested = self._returns_routers(inputs)
        own = Request(requested, inputs.pop("token_mask", None), inputs.pop("image_mask", None))
        request, self.request = self.request or own, None
        self._check_images(inputs)
        request.token_mask_T = real_tokens(inputs, request.token_mask)
        # SMoES routes without the mask, which only its statistics need: serving engines pass embeddings, without token ids.
        masked = self.config.routing == "modality_split" or (self.config.routing == "smoes" and request.record)
        image_mask_T = self._image_mask(inputs, request.image_mask) if masked else None
        mlps = list(self.sparse_mlps().values())
        vision_mlps = list(self.vision_mlps().values())
        for mlp in mlps:
            mlp.token_mask, mlp.image_mask = request.token_mask_T, image_mask_T
        for mlp in [*mlps, *vision_mlps]:
            mlp.record, mlp.recorded = request.record, {}
        outputs = self.dense_class.forward(self, **inputs, return_dict=True)
        for prefix, recording in ("", mlps), (VISION, vision_mlps):
            for mlp in recording if request.record else []:
                for name, value in mlp.take_record().items():
                    request.recorded[prefix + name] = (*request.recorded.get(prefix + name, ()), value)
        if request.rows is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[request.rows.to(outputs.last_hidden_state.device)][None]
        return extended(outputs, request.recorded if requested else {})

    def _returns_routers(self, inputs: dict[str, Any]) -> bool:
        given = inputs.pop("output_router_logits", None)
        return getattr(self.config.get_text_config(), "output_router_logits", False) if given is None else given

    def _check_images(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError for placeholders without images, except in generation, where assistants get no images. Families compare the
        numbers only if there are images."""
        ids = inputs.get("input_ids")
        seen = any(value is not None and name.startswith(VISUAL) for name, value in inputs.items())
        if ids is None or seen or inputs.get("past_key_values") is not None:
            return
        number = sum((ids == token).sum() for token in placeholder_ids(self.config))
        torch_compilable_check(number == 0, lambda: f"found {int(number)} image placeholders in input_ids, but no images")

    def _image_mask(self, inputs: dict[str, Any], image_mask: Tensor | None) -> Tensor:
        """Return [T] bool, True for tokens of images and videos: the given mask, or that of input_ids."""
        if image_mask is not None:
            return image_mask if image_mask.dim() == 1 else image_mask.reshape(-1)
        if inputs.get("input_ids") is None:
            needed = "input_ids, or image_mask with inputs_embeds"
            raise ValueError(f"routing {self.config.routing} needs the positions of the images: {needed}")
        return self.image_tokens(inputs["input_ids"].reshape(-1))

    def image_tokens(self, ids_T: Tensor) -> Tensor:
        """Return [T] bool, True for tokens of images and videos. Generated tokens are text."""
        return torch.isin(ids_T, torch.tensor(placeholder_ids(self.config), device=ids_T.device))
