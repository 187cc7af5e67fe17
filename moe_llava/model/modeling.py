"""The sparse LLaVA: transformers' LLaVA whose language model has experts in some layers. One class for every family.

Unusual here:
- The language model's class is made on the fly: a subclass of the family's own backbone that swaps `layer.mlp` for a SparseMlp in its
  constructor and tells transformers how to record the router. Nothing is patched, and no family is named.
- The image placeholder needs no row in the embedding table: its id may lie outside the vocabulary.

Shapes: B batch, S sequence, T = B * S tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration import MoeLlavaConfig
from .ffn import sparse_mlp
from .moe import GatedExperts, Router, SparseMlp, balance_loss, init_sparse_weights, z_loss
from .smoes import ModalityStatistics, mutual_information_loss, sum_over_processes

RECORDED = ("output_router_logits", "output_router_drops", "output_modality_scores", "output_modality_sums")  # what the losses are made of


@dataclass
class MoeLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """`router_logits`: per MoE layer [T, E] float32; `router_drops`: per MoE layer [T, K] bool; with SMoES also `modality_scores`, per MoE
    layer [T, 2], and `modality_sums`, what the statistics learn from. None unless asked for."""

    router_logits: tuple[Tensor, ...] | None = None
    router_drops: tuple[Tensor, ...] | None = None
    modality_scores: tuple[Tensor, ...] | None = None
    modality_sums: tuple[Tensor, ...] | None = None


@dataclass
class MoeLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """`logits`: [B, S, V]; while training on labels [N, V], of the N tokens whose next one is learnt, row by row;
    `language_loss`: the loss before the auxiliary ones are added; `aux_loss`: the balance loss summed over the MoE layers, `z_loss`
    the same of the z-loss, and `mi_loss` of the mutual information loss of SMoES, all before their coefficients; `router_logits`: per MoE
    layer [T, E] float32; `router_drops`: per MoE layer [T, K] bool, the assignments that found their expert full; `modality_scores`: with
    SMoES, per MoE layer [T, 2], how much a token is like one of an image and like one of text."""

    language_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    mi_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_drops: tuple[Tensor, ...] | None = None
    modality_scores: tuple[Tensor, ...] | None = None


class SparseBackbone(PreTrainedModel):
    """Mixed into a family's backbone by `sparse_backbone_class`."""

    def __init__(self, config: Any, moe_config: MoeLlavaConfig):
        super().__init__(config)
        for index in moe_config.moe_layer_indices:
            self.layers[index].mlp = sparse_mlp(moe_config, self.layers[index])
        self.post_init()
        # How transformers gives each process whole experts, and sends it their tokens: DistributedConfig(ep_size=...).
        experts = self.layers[moe_config.moe_layer_indices[0]].mlp.experts
        self._ep_plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name, _ in experts.named_parameters()}
        self._ep_plan["layers.*.mlp.experts"] = "ep_dispatch_experts"
        # By these fields, saved with the model, an engine with kernels of its own knows that it has experts: vLLM does, and takes them
        # to be gated by SiLU. It runs others as they are written here, if it is not told.
        if isinstance(experts, GatedExperts) and config.hidden_act == "silu":
            config.num_experts = moe_config.num_experts
            config.num_experts_per_tok = moe_config.num_experts_per_tok
            config.norm_topk_prob = moe_config.norm_topk_prob
            config.moe_intermediate_size = experts.intermediate_dim

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_sparse_weights(module, self.config.initializer_range)
        if isinstance(module, ModalityStatistics):
            module.reset()


@cache
def sparse_backbone_class(dense_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The sparse subclass of a backbone such as LlamaModel."""
    recorders = {
        **(dense_class._can_record_outputs or {}),
        "router_logits": OutputRecorder(Router, index=0),
        "router_drops": OutputRecorder(Router, index=3),
        "modality_scores": OutputRecorder(ModalityStatistics, index=0),
        "modality_sums": OutputRecorder(ModalityStatistics, index=1),
    }
    namespace = {
        "_can_record_outputs": recorders,
        "_keep_in_fp32_modules_strict": {*(dense_class._keep_in_fp32_modules_strict or ()), "statistics"},  # of SMoES, when loaded
        # The family's module, not this one, so that transformers finds the family's attention code where it looks for it.
        "__module__": dense_class.__module__,
    }
    return type(f"Sparse{dense_class.__name__}", (SparseBackbone, dense_class), namespace)


class MoeLlavaPreTrainedModel(LlavaPreTrainedModel):
    config: MoeLlavaConfig
    config_class = MoeLlavaConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for the decorator in this file; the experts are in moe.py


class MoeLlavaModel(MoeLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and sparse language model, without the language modeling head."""

    def __init__(self, config: MoeLlavaConfig):
        config.check_moe()
        # Not LlavaModel.__init__: that would build the dense language model first.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        backbone = sparse_backbone_class(MODEL_MAPPING[type(config.text_config)])
        self.language_model = backbone(config.text_config, config)
        self.post_init()

    def sparse_mlps(self) -> dict[int, SparseMlp]:
        """Layer index -> its SparseMlp."""
        return {index: self.language_model.layers[index].mlp for index in self.config.moe_layer_indices}

    def expert_groups(self) -> list[Tensor] | None:
        """Per MoE layer the experts [G, N] that share a load: halves or bins; None if all experts of a layer do."""
        mlps = self.sparse_mlps().values()
        if self.config.routing == "agnostic":
            return None
        if self.config.routing == "modality_split":
            return [torch.arange(self.config.num_experts).view(2, -1) for _ in mlps]
        return [mlp.statistics.bins() for mlp in mlps if mlp.statistics is not None]

    def update_statistics(self, modality_sums: tuple[Tensor, ...]) -> None:
        """Lets the statistics of SMoES learn from the batch, given the recorded sums of each MoE layer, of all processes together."""
        sums = sum_over_processes(torch.stack([layer.to(modality_sums[0].device) for layer in modality_sums]))
        for mlp, layer in zip(self.sparse_mlps().values(), sums, strict=True):
            assert mlp.statistics is not None
            mlp.statistics.update(layer.to(mlp.statistics.mean.device))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> MoeLlavaModelOutputWithPast:
        """As LlavaModel.forward; `output_router_logits=True` also records the routers, `output_modality_scores=True` what SMoES sees."""
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy or self.config.vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
        image_features = None if images is None else torch.cat(list(images.pooler_output), dim=0)
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, image_features)
        elif inputs_embeds is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        elif image_features is not None:
            raise ValueError("images need input_ids, which say where the images stand; inputs_embeds do not")

        token_mask_T = real_tokens(attention_mask, inputs_embeds)
        image_mask_T = self._image_tokens(input_ids)
        for mlp in self.sparse_mlps().values():
            mlp.token_mask, mlp.image_mask = token_mask_T, image_mask_T
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MoeLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            router_logits=outputs.get("router_logits"),
            router_drops=outputs.get("router_drops"),
            modality_scores=outputs.get("modality_scores") or None,
            modality_sums=outputs.get("modality_sums") or None,
        )

    def _image_tokens(self, input_ids: Tensor | None) -> Tensor | None:
        """[T] bool, True for a token of an image, where the routers are to know; None elsewhere. A token that is generated is text."""
        if self.config.routing == "agnostic":
            return None
        if input_ids is None:
            raise ValueError(f"routing {self.config.routing} needs input_ids, which say where the images stand; inputs_embeds do not")
        return (input_ids == self.config.image_token_id).reshape(-1)

    def _embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """[B, S] ids -> [B, S, D], image features in the places of the placeholders."""
        is_image_BS = input_ids == self.config.image_token_id
        embeds_BSD = self.get_input_embeddings()(input_ids.masked_fill(is_image_BS, 0))
        num_features = 0 if image_features is None else image_features.shape[:-1].numel()
        num_places = int(is_image_BS.sum())
        if num_places != num_features:
            raise ValueError(f"found {num_places} image placeholders in input_ids, but the images make {num_features} features")
        if image_features is None:
            return embeds_BSD
        return embeds_BSD.masked_scatter(is_image_BS[..., None], image_features.to(embeds_BSD))


class MoeLlavaForConditionalGeneration(MoeLlavaPreTrainedModel, LlavaForConditionalGeneration):
    """A sparse LLaVA with its language modeling head: what `upcycle` makes, trains, generates and saves."""

    def __init__(self, config: MoeLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MoeLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Raises ValueError for use_reentrant=True, under which the router's losses lose their gradient without a word."""
        gradient_checkpointing_kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if gradient_checkpointing_kwargs["use_reentrant"]:
            raise ValueError("gradient checkpointing with use_reentrant=True gives the balance loss no gradient: use use_reentrant=False")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MoeLlavaCausalLMOutputWithPast:
        """
        Args:
            input_ids: [B, S]; each image is as many `config.image_token_id` as it makes features.
            pixel_values: [images, channels, height, width], in the order of their placeholders.
            attention_mask: [B, S], 0 for padding, which then counts neither in the losses nor in the capacity.
            labels: [B, S], -100 where nothing is to be learnt.
            output_router_logits: None means the configuration's.
            logits_to_keep: compute logits for the last n positions only (0: all; in training, those that predict labels), or those given.
            num_items_in_batch: labels in all batches that make up one step (Trainer passes it); losses are weighted by this batch's share.

        The loss is cross entropy + router_aux_loss_coef * aux_loss + router_z_loss_coef * z_loss, and with SMoES + router_mi_loss_coef *
        mi_loss. Outside training only the first is part of it without `output_router_logits`, as in transformers' MoE models.
        """
        output_router_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        record = output_router_logits or (self.training and labels is not None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **dict.fromkeys(RECORDED, record),
            **kwargs,
        )
        losses = self._router_losses(outputs, real_tokens(attention_mask, outputs.last_hidden_state)) if record else {}
        logits, kwargs = self._logits(outputs.last_hidden_state, labels, logits_to_keep, kwargs)
        if labels is not None:
            losses["language_loss"] = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
            losses["loss"] = self._total_loss(losses, labels, num_items_in_batch)
            if self.training and outputs.modality_sums:
                self.model.update_statistics(outputs.modality_sums)
        return MoeLlavaCausalLMOutputWithPast(
            **losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            router_logits=outputs.router_logits if output_router_logits else None,
            router_drops=outputs.router_drops if output_router_logits else None,
            modality_scores=outputs.modality_scores if output_router_logits else None,
        )

    def _logits(
        self, hidden_BSD: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """(logits, what the loss function is given with them). While training, only of the tokens whose next one is learnt: with a large
        vocabulary the logits of all would take more memory than all else in a step."""
        if labels is None or not self.training or not isinstance(logits_to_keep, int) or logits_to_keep:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return self.lm_head(hidden_BSD[:, keep, :]), kwargs
        targets_BS = (kwargs["shift_labels"] if "shift_labels" in kwargs else next_labels(labels)).to(hidden_BSD.device)
        learnt_BS = targets_BS != -100
        return self.lm_head(hidden_BSD[learnt_BS]), {**kwargs, "shift_labels": targets_BS[learnt_BS]}

    def _router_losses(self, outputs: MoeLlavaModelOutputWithPast, token_mask_T: Tensor | None) -> dict[str, Tensor]:
        """The auxiliary losses by name, of the recorded routers."""
        assert outputs.router_logits is not None
        groups = self.model.expert_groups()
        losses = {
            "aux_loss": balance_loss(outputs.router_logits, token_mask_T, groups),
            "z_loss": z_loss(outputs.router_logits, token_mask_T),
        }
        if outputs.modality_scores and groups is not None:
            losses["mi_loss"] = mutual_information_loss(outputs.router_logits, outputs.modality_scores, groups, token_mask_T)
        return losses

    def _total_loss(self, losses: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The language loss and, if there are any, the auxiliary ones, weighted by the batch's share of a step's labels."""
        if "aux_loss" not in losses:
            return losses["language_loss"]
        # Label 0 of each row predicts nothing.
        share = 1.0 if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch
        auxiliary = self.config.router_aux_loss_coef * losses["aux_loss"] + self.config.router_z_loss_coef * losses["z_loss"]
        if "mi_loss" in losses:
            auxiliary = auxiliary + self.config.router_mi_loss_coef * losses["mi_loss"]
        return losses["language_loss"] + share * auxiliary


def next_labels(labels_BS: Tensor) -> Tensor:
    """[B, S]: of each token the label of the one after it, which it predicts; -100 for the last."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=-100)


def real_tokens(attention_mask: Any, embeds_BSD: Tensor) -> Tensor | None:
    """[T] bool, False for padding, of the positions in `embeds_BSD`; None if there is no 2-D mask to tell by. While generating the
    mask also covers the cached positions, which come first."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None  # generation with a static cache hands over 4-D masks, one for each kind of layer
    return attention_mask[:, -embeds_BSD.shape[1] :].reshape(-1).bool()
