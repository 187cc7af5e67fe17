"""The route of every token: the router's probabilities, the chosen experts, their weights, and the kind of token.

Unusual here:
- Routers are found by what transformers itself records as `router_logits`. So other sparse models of transformers can be traced too, if
  their routers return (logits, weights, expert indices) and weigh by a softmax or a sigmoid. Others are refused, not misread.
- Forward hooks, since `generate` never returns router logits. They exist only while something is traced.

Shapes: B rows of a batch, S sequence, T tokens of all rows without padding, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from moe_llava.common.errors import DataError
from moe_llava.data.batches import TOKEN_INPUTS, Collator, ConversationDataset
from moe_llava.data.encode import IGNORE_INDEX
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.model.greedy import as_list, end_tokens, write_greedily
from moe_llava.routing.recording import Parts, Recorded, counting_patches, recording
from moe_llava.routing.tokens import IMAGE, MEDIA, SPECIAL, TEXT, RoutingError, image_places, placeholder_kinds

FORMAT = "moe-llava-trace-1"
# How far weights, divided by their sum, may be from those of a softmax: allows rounding, but no other rule with small logits.
CLOSE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Trace:
    """The routes of the tokens of one or several rows, row after row, without padding.

    `probs_LTE`: softmax of the router's logits, or their sigmoid divided by its sum, float32. `ids_LTK`: the chosen experts, in order of
    falling probability, and `weights_LTK`: their weights. `dropped_LTK`: assignments to a full expert, whose weight is 0.
    `token_ids_T`, `rows_T`: the token and its row. `kinds_T`: an index of KINDS. `answer_T`: whether the token belongs to an answer, of the
    model or of a record; the others are prompt. `places_T3`: for an image's token, the index of the image in its row, of the tile if the
    model sees tiles, and the row and column of its patch; -1 for others, such as a class token or a video.
    `layers`: indices of the MoE layers. `pieces`: each token as text, if there is a tokenizer; "" for a placeholder. `patches`: for each
    router outside the language model, by its label, the patches that each expert took, of the images of all rows.
    """

    probs_LTE: Tensor
    ids_LTK: Tensor
    weights_LTK: Tensor
    dropped_LTK: Tensor
    token_ids_T: Tensor
    rows_T: Tensor
    kinds_T: Tensor
    answer_T: Tensor
    places_T3: Tensor
    layers: tuple[int, ...]
    pieces: tuple[str, ...] | None = None
    patches: dict[str, list[int]] = field(default_factory=dict)

    @property
    def pictures(self) -> list[int]:
        """The images of one row, or their tiles, whose patches have places. Aria's have none: each token is a query to the whole image."""
        return self.places_T3[self.places_T3[:, 1] >= 0, 0].unique().tolist()

    def split(self) -> list[Trace]:
        """Return a trace for each row."""
        return [self.row(number) for number in self.rows_T.unique().tolist()]

    def row(self, number: int) -> Trace:
        """Return the tokens of one row. `patches` is left out if there are other rows, whose patches it has, too."""
        mask_T = self.rows_T == number
        chosen: dict[str, Any] = {}
        for name in _tensor_names():
            value = getattr(self, name)
            chosen[name] = value[:, mask_T] if name.split("_")[-1].startswith("L") else value[mask_T]
        pieces = self.pieces and tuple(piece for piece, kept in zip(self.pieces, mask_T.tolist(), strict=True) if kept)
        return replace(self, **chosen, pieces=pieces, patches=self.patches if mask_T.all() else {})

    def save(self, file: str | Path, **notes: str) -> None:
        """Write safetensors: a tensor for each field, with layers, pieces, patches and `notes` as metadata."""
        tensors = {name: getattr(self, name).contiguous() for name in _tensor_names()}
        others = {name: json.dumps(getattr(self, name)) for name in ("layers", "pieces", "patches")}
        metadata = {"format": FORMAT, **others, **notes}
        save_file(tensors, file, metadata=metadata)

    @classmethod
    def load(cls, file: str | Path) -> Trace:
        """Raise RoutingError if `file` is no trace, FileNotFoundError if it does not exist."""
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise RoutingError(f"{file} is no trace: its format is {metadata.get('format')!r}, not {FORMAT!r}")
                tensors = {name: opened.get_tensor(name) for name in _tensor_names()}
        except SafetensorError as error:
            raise RoutingError(f"{file} is no trace: {error}") from error
        pieces = json.loads(metadata["pieces"])
        patches = json.loads(metadata.get("patches", "{}"))  # files written before models had any lack it
        return cls(**tensors, layers=tuple(json.loads(metadata["layers"])), pieces=pieces and tuple(pieces), patches=patches)


def _tensor_names() -> list[str]:
    return [f.name for f in fields(Trace) if f.name not in ("layers", "pieces", "patches")]


def trace_routing(model: PreTrainedModel, inputs: Mapping[str, Any], tokenizer: Any = None, max_new_tokens: int | None = None) -> Trace:
    """Return the routes of `inputs` in one forward pass. With `max_new_tokens`, generate a greedy answer and include its routes, except its
    last token, which is never an input. An answer needs rows that are padded on the left.

    Args:
        inputs: `input_ids` and the model's other inputs. `labels`, which the model does not get, mark the tokens of answers: those that
            are not -100.
        tokenizer: names the special tokens and decodes the pieces. Without it, the special tokens are those of the model's configuration:
            beginning, end and padding.

    Raise RoutingError if the model has no routers or none that can be read, if the tokens of an image, a video or audio cannot be
    distinguished from text, if the places of an image are not known, and if an answer would follow padding.
    """
    given = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if "input_ids" not in given:
        raise RoutingError(f"found {', '.join(given)} in the inputs, but no input_ids, which distinguish images from text")
    labels_BS = given.pop("labels", None)
    ids_BS = given["input_ids"]
    if max_new_tokens is not None:
        given["attention_mask"] = _generation_mask(model, given)
    mask_BS = given.get("attention_mask", torch.ones_like(ids_BS)).bool()
    answer_BS = torch.zeros_like(mask_BS) if labels_BS is None else labels_BS != IGNORE_INDEX
    placeholders = placeholder_kinds(model.config, given)
    with recording(model) as recorded, counting_patches(model) as patches, torch.no_grad():
        if max_new_tokens is None:
            model.base_model(**given, use_cache=False)  # without the head, whose logits would take more memory than the rest
        else:
            ids_BS, new_BS = _generate(model, given, max_new_tokens)
            mask_BS, answer_BS = torch.cat([mask_BS, new_BS], dim=1), torch.cat([answer_BS, new_BS], dim=1)
    ids_BS, mask_BS, answer_BS = ids_BS.cpu(), mask_BS.cpu(), answer_BS.cpu()
    routes = _stack(recorded, mask_BS)
    kinds_BS = torch.full_like(ids_BS, TEXT, dtype=torch.uint8)
    kinds_BS[torch.isin(ids_BS, torch.tensor(sorted(_special_ids(model, tokenizer)), dtype=ids_BS.dtype))] = SPECIAL
    for token, kind in placeholders.items():
        kinds_BS[ids_BS == token] = kind
    token_ids_T, kinds_T = ids_BS[mask_BS], kinds_BS[mask_BS]
    return Trace(
        **routes,
        token_ids_T=token_ids_T,
        rows_T=mask_BS.nonzero()[:, 0],
        kinds_T=kinds_T,
        answer_T=answer_BS[mask_BS],
        places_T3=image_places((kinds_BS == IMAGE) & mask_BS, inputs, model)[mask_BS],
        layers=tuple(sorted(recorded)),
        pieces=None if tokenizer is None else _pieces(tokenizer, token_ids_T, kinds_T),
        patches={label: counts_E.tolist() for label, counts_E in patches.items()},
    )


def trace_answer(model: PreTrainedModel, tokenizer: Any, prompt: list[int], answer: list[int], inputs: Mapping[str, Tensor]) -> Trace:
    """Return the routes of one prompt and its answer, given as token ids, in one forward pass. `inputs`: the prompt's other inputs; types
    of tokens cover the prompt, and may cover the answer."""
    ids = {"input_ids": torch.tensor([prompt + answer]), "labels": torch.tensor([[IGNORE_INDEX] * len(prompt) + answer])}
    length = len(prompt) + len(answer)
    types = {name: F.pad(value, (0, length - value.shape[1])) for name, value in inputs.items() if name in TOKEN_INPUTS}
    images = {name: value for name, value in inputs.items() if name not in TOKEN_INPUTS}
    images |= {name: value.to(model.dtype) for name, value in images.items() if value.is_floating_point()}
    return trace_routing(model, ids | types | images, tokenizer)


def trace_records(model: PreTrainedModel, processor: Any, records: Sequence[Record], batch_size: int) -> Iterator[Trace]:
    """Yield the routes of conversations, batch by batch in their order; only one batch is held at a time.

    Raise DataError for a record that cannot be read, RoutingError as `trace_routing` does.
    """
    encoder = Encoder(processor)
    dataset, collate = ConversationDataset(records, encoder), Collator(encoder.nothing())
    for batch in DataLoader(dataset, batch_size, collate_fn=collate):
        if "problems" in batch:
            raise DataError("\n  ".join(batch["problems"]))
        yield trace_routing(model, batch, processor.tokenizer)


def _stack(recorded: Recorded, mask_BS: Tensor) -> dict[str, Tensor]:
    """Return the fields of a Trace that routers provide, for the tokens in the mask. Raise RoutingError if the passes do not add up to
    these tokens, a layer has several routers, or the weights follow no known rule."""
    layers, rules = [], []
    for index, passes in sorted(recorded.items()):
        routers = sorted({one.router for one in passes})
        if len(routers) > 1:
            raise RoutingError(f"layer {index} has several routers, {' and '.join(routers)}, but a trace holds one for each layer")
        evidence = _joined(index, [one.evidence for one in passes], mask_BS)
        rules.append(_rule_of(routers[0], *evidence))
        if evidence[0].shape[1] > 1 and (evidence[0] == evidence[0][:, :1]).all() and not passes[0].ours:
            raise RoutingError(f"the router {routers[0]} gives all experts the same logit, so how it weighs experts is not known")
        layers.append(_joined(index, [one.output for one in passes], mask_BS))
    logits_LTE, weights_LTK, ids_LTK, dropped_LTK = (torch.stack([layer[part] for layer in layers]) for part in range(4))
    probs_LTE, weights_LTK = torch.stack([rule(logits) for rule, logits in zip(rules, logits_LTE, strict=True)]), weights_LTK.float()
    order_LTK = probs_LTE.gather(-1, ids_LTK).argsort(dim=-1, descending=True, stable=True)  # not every router sorts them
    ids_LTK, weights_LTK, dropped_LTK = (part.gather(-1, order_LTK) for part in (ids_LTK, weights_LTK, dropped_LTK))
    return {"probs_LTE": probs_LTE, "ids_LTK": ids_LTK, "weights_LTK": weights_LTK, "dropped_LTK": dropped_LTK}


def _joined(layer: int, passes: Sequence[Parts], mask_BS: Tensor) -> list[Tensor]:
    """Join passes, each of which has the next tokens of every row; return the four parts, [T, E] or [T, K], of the tokens in the mask."""
    rows, length = mask_BS.shape
    parts = [torch.cat([part.view(rows, -1, part.shape[-1]) for part in found], dim=1) for found in zip(*passes, strict=True)]
    seen = parts[0].shape[1] if parts else 0
    if seen != length:
        raise RoutingError(f"the router of layer {layer} saw {seen} tokens in a row of {length}")
    return [part.cpu()[mask_BS] for part in parts]  # layers may be on several devices


def _softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.float().softmax(dim=-1)


def _sigmoid(logits_TE: Tensor) -> Tensor:
    scores_TE = logits_TE.float().sigmoid()
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True)


def _rule_of(router: str, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor, dropped_TK: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how probabilities follow from logits: by the rule that explains the weights, both normalised over the chosen experts. Raise
    RoutingError if none does."""
    close = max(CLOSE.get(part.dtype, 0) for part in (logits_TE, weights_TK))
    for rule in (_softmax, _sigmoid):
        chosen_TK = rule(logits_TE).gather(-1, ids_TK).masked_fill(dropped_TK, 0.0)
        expected_TK, found_TK = (part / part.sum(-1, keepdim=True).clamp(min=1e-9) for part in (chosen_TK, weights_TK.float()))
        if torch.allclose(expected_TK, found_TK, rtol=0, atol=close):
            return rule
    raise RoutingError(
        "the routers weigh experts neither by the softmax nor by the sigmoid of their logits, so their probabilities are not known: "
        f"{router}"
    )


def _generation_mask(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the attention mask of the prompts; without one in the inputs, padding tokens are masked, as generate() does.

    Raise RoutingError if padding ends a row: the answer would follow it.
    """
    mask_BS: Tensor | None = inputs.get("attention_mask")
    if mask_BS is None:
        pad = model.generation_config.pad_token_id
        is_padding = pad is not None and pad not in end_tokens(model)
        mask_BS = inputs["input_ids"] != pad if is_padding else torch.ones_like(inputs["input_ids"])
    padded = (mask_BS[:, -1] == 0).nonzero().flatten().tolist()
    if padded:
        raise RoutingError(
            f"rows {', '.join(map(str, padded))} of the inputs end with padding, which an answer must not follow: pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return mask_BS.long()


def _generate(model: PreTrainedModel, inputs: dict[str, Any], max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the ids [B, S + N] of prompts and answers, without their last token, and whether a new token [B, N] belongs to its answer."""
    ids_BS = write_greedily(model, inputs, max_new_tokens)[:, :-1]
    new_BS = ids_BS[:, inputs["input_ids"].shape[1] :]
    ends_BS = torch.isin(new_BS, torch.tensor(end_tokens(model), device=new_BS.device, dtype=new_BS.dtype))
    # Tokens after the first end are padding.
    return ids_BS, (ends_BS.cumsum(1) - ends_BS.long()) == 0


def _special_ids(model: PreTrainedModel, tokenizer: Any) -> Collection[int]:
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    config = model.config.get_text_config()
    return {number for name in ("bos", "eos", "pad") for number in as_list(getattr(config, f"{name}_token_id"))}


def _pieces(tokenizer: Any, token_ids_T: Tensor, kinds_T: Tensor) -> tuple[str, ...]:
    return tuple(
        "" if kind in MEDIA else tokenizer.decode([token]) for token, kind in zip(token_ids_T.tolist(), kinds_T.tolist(), strict=True)
    )
