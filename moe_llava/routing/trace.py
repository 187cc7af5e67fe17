"""Where every token went: the router's probabilities, the chosen experts, their weights, and what kind of token it was.

Unusual here:
- Routers are found by what transformers itself records as `router_logits`, so other sparse models of transformers can be traced, too, if
  their routers return (logits, weights, expert indices) and weigh by a softmax. What does not is refused, not misread.
- Forward hooks, since `generate` never returns router logits. They are there for as long as something is traced, and no longer.

Shapes: B rows of a batch, S sequence, T tokens of all rows without padding, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from moe_llava.common.errors import DataError
from moe_llava.data.batches import Collator, ConversationDataset
from moe_llava.data.encode import IGNORE_INDEX
from moe_llava.data.records import Record
from moe_llava.model.greedy import as_list, end_tokens, write_greedily
from moe_llava.routing.tokens import IMAGE, SPECIAL, TEXT, RoutingError, image_places

FORMAT = "moe-llava-trace-1"
CLOSE = 0.02  # weights may be in half precision

Recorded = dict[int, list[tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Trace:
    """The routes of the tokens of one or several rows, row after row, without padding.

    `probs_LTE`: softmax of the router's logits, float32. `ids_LTK`: the chosen experts, in order of falling probability, and
    `weights_LTK` theirs, of which those in `dropped_LTK`, which found their expert full, are 0.
    `token_ids_T`, `rows_T`: the token, and the row that it stands in. `kinds_T`: TEXT, SPECIAL or IMAGE. `answer_T`: whether it belongs to
    an answer, of the model or, in a record, to be learnt; the rest is prompt. `places_T3`: of an image's token the image in its row, and
    the row and column of its patch; -1 where there is none, as for a class token.
    `layers`: indices of the MoE layers. `pieces`: each token as text, if a tokenizer was given; "" for an image's.
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

    def split(self) -> list[Trace]:
        """A trace for each row."""
        return [self.row(number) for number in self.rows_T.unique().tolist()]

    def row(self, number: int) -> Trace:
        """The tokens of one row."""
        mask_T = self.rows_T == number
        chosen: dict[str, Any] = {}
        for name in _tensor_names():
            value = getattr(self, name)
            chosen[name] = value[:, mask_T] if name.split("_")[-1].startswith("L") else value[mask_T]
        pieces = self.pieces and tuple(piece for piece, kept in zip(self.pieces, mask_T.tolist(), strict=True) if kept)
        return replace(self, **chosen, pieces=pieces)

    def save(self, file: str | Path, **notes: str) -> None:
        """Writes safetensors, a tensor for each field; layers, pieces and `notes` are its metadata."""
        tensors = {name: getattr(self, name).contiguous() for name in _tensor_names()}
        told = {"format": FORMAT, "layers": json.dumps(self.layers), "pieces": json.dumps(self.pieces), **notes}
        save_file(tensors, file, metadata=told)

    @classmethod
    def load(cls, file: str | Path) -> Trace:
        """Raises RoutingError if `file` is no trace; FileNotFoundError if there is none."""
        try:
            with safe_open(file, framework="pt") as opened:
                told = opened.metadata() or {}
                if told.get("format") != FORMAT:
                    raise RoutingError(f"{file} is no trace: its format is {told.get('format')!r}, not {FORMAT!r}")
                tensors = {name: opened.get_tensor(name) for name in _tensor_names()}
        except SafetensorError as error:
            raise RoutingError(f"{file} is no trace: {error}") from error
        pieces = json.loads(told["pieces"])
        return cls(**tensors, layers=tuple(json.loads(told["layers"])), pieces=pieces and tuple(pieces))


def _tensor_names() -> list[str]:
    return [field.name for field in fields(Trace) if field.name not in ("layers", "pieces")]


def trace_routing(model: PreTrainedModel, inputs: Mapping[str, Any], tokenizer: Any = None, max_new_tokens: int | None = None) -> Trace:
    """The routes of `inputs`, as a processor or tokenizer makes them: of one forward pass, or, with `max_new_tokens`, of a greedy answer,
    too, except for its last token, which the model never reads.

    Args:
        inputs: `input_ids` and what else the model takes. `labels`, if there are any, say which tokens are answers (those that are not
            -100); the model does not get them.
        tokenizer: whose special tokens count as such, and whose pieces are kept. Without it, special are those that the model's
            configuration names: beginning, end and padding.

    Raises RoutingError if the model has no routers, or such as cannot be read, or the places of its images cannot be told.
    """
    given = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if "input_ids" not in given:
        raise RoutingError(f"found {', '.join(given)} in the inputs, but no input_ids, which tell image from text")
    labels_BS = given.pop("labels", None)
    ids_BS = given["input_ids"]
    mask_BS = given.get("attention_mask", torch.ones_like(ids_BS)).bool()
    answer_BS = torch.zeros_like(mask_BS) if labels_BS is None else labels_BS != IGNORE_INDEX
    image_id = getattr(model.config, "image_token_id", None)  # a language model without images has none
    with _recording(model) as recorded, torch.no_grad():
        if max_new_tokens is None:
            model(**given, use_cache=False, logits_to_keep=1)
        else:
            ids_BS, new_BS = _generate(model, given, max_new_tokens)
            mask_BS, answer_BS = torch.cat([mask_BS, new_BS], dim=1), torch.cat([answer_BS, new_BS], dim=1)
    ids_BS, mask_BS, answer_BS = ids_BS.cpu(), mask_BS.cpu(), answer_BS.cpu()
    routes = _stack(recorded, mask_BS)
    is_image_BS = (ids_BS == image_id) & mask_BS if image_id is not None else torch.zeros_like(mask_BS)
    kinds_BS = torch.full_like(ids_BS, TEXT, dtype=torch.uint8)
    kinds_BS[torch.isin(ids_BS, torch.tensor(sorted(_special_ids(model, tokenizer)), dtype=ids_BS.dtype))] = SPECIAL
    kinds_BS[is_image_BS] = IMAGE
    token_ids_T, kinds_T = ids_BS[mask_BS], kinds_BS[mask_BS]
    return Trace(
        **routes,
        token_ids_T=token_ids_T,
        rows_T=mask_BS.nonzero()[:, 0],
        kinds_T=kinds_T,
        answer_T=answer_BS[mask_BS],
        places_T3=image_places(is_image_BS, inputs, model.config)[mask_BS],
        layers=tuple(sorted(recorded)),
        pieces=None if tokenizer is None else _pieces(tokenizer, token_ids_T, kinds_T),
    )


def trace_answer(model: PreTrainedModel, tokenizer: Any, prompt: list[int], answer: list[int], pixel_values: Tensor | None) -> Trace:
    """The routes of one prompt and of an answer to it, given as token ids, in one forward pass. `pixel_values`: of the prompt's images."""
    inputs = {"input_ids": torch.tensor([prompt + answer]), "labels": torch.tensor([[IGNORE_INDEX] * len(prompt) + answer])}
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values.to(model.dtype)
    return trace_routing(model, inputs, tokenizer)


def trace_records(model: PreTrainedModel, processor: Any, records: Sequence[Record], batch_size: int) -> Iterator[Trace]:
    """The routes of conversations, questions and answers, batch after batch in their order; only one batch is held at a time.

    Raises DataError for a record that cannot be read, RoutingError as `trace_routing` does.
    """
    dataset = ConversationDataset(records, processor)
    collate = Collator(processor.tokenizer.pad_token_id)
    for batch in DataLoader(dataset, batch_size, collate_fn=collate):
        if "problems" in batch:
            raise DataError("\n  ".join(batch["problems"]))
        yield trace_routing(model, batch, processor.tokenizer)


@contextlib.contextmanager
def _recording(model: PreTrainedModel) -> Iterator[Recorded]:
    """Layer -> what its router returned in each pass, while the context lasts."""
    recorded: Recorded = {}
    handles = []
    try:
        for name, router in find_routers(model).items():
            outputs = recorded.setdefault(_layer_index(name), [])
            handles.append(router.register_forward_hook(_appending(outputs, name)))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _appending(outputs: list[tuple[Tensor, ...]], name: str) -> Any:
    def append(module: nn.Module, arguments: Any, output: Any) -> None:
        _check_output(name, module, output)
        outputs.append(tuple(value.detach() for value in output))

    return append


def find_routers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> router, in the order of layers. Raises RoutingError if there is none."""
    recorders = [
        (module._can_record_outputs or {}).get("router_logits") for module in model.modules() if isinstance(module, PreTrainedModel)
    ]
    classes = tuple({recorder.target_class for recorder in recorders if recorder is not None})
    found = {name: module for name, module in model.named_modules() if isinstance(module, classes)}
    if not found:
        raise RoutingError(f"{type(model).__name__} has no routers: it is dense, or transformers does not record its router_logits")
    return found


def _layer_index(name: str) -> int:
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if number is None:
        raise RoutingError(f"the router {name} stands in no numbered layer")
    return number


def _check_output(name: str, router: nn.Module, output: Any) -> None:
    """Raises RoutingError unless a router returned logits [T, E], weights [T, K] and expert indices [T, K]."""
    shapes = [tuple(value.shape) for value in output] if isinstance(output, tuple) else []
    if (
        len(shapes) < 3
        or any(len(shape) != 2 for shape in shapes)
        or shapes[1] != shapes[2]
        or shapes[0][1] < shapes[1][1]
        or output[2].is_floating_point()
    ):
        raise RoutingError(
            f"the router {name} ({type(router).__name__}) returned shapes {shapes}, but to be traced it must return logits [T, E], "
            "weights [T, K] and expert indices [T, K]"
        )


def _stack(recorded: Recorded, mask_BS: Tensor) -> dict[str, Tensor]:
    """The fields of a Trace that a router gives, of the tokens in the mask. Raises RoutingError if passes do not add up to them, or the
    weights do not come from a softmax."""
    rows, length = mask_BS.shape
    layers = []
    for index, outputs in sorted(recorded.items()):
        # A pass reads the next tokens of every row.
        parts = [torch.cat([out[part].view(rows, -1, out[part].shape[-1]) for out in outputs], dim=1) for part in range(len(outputs[0]))]
        if parts[0].shape[1] != length:
            raise RoutingError(f"the router of layer {index} saw {parts[0].shape[1]} tokens in a row of {length}")
        layers.append([part.cpu()[mask_BS] for part in parts])  # layers may stand on several devices
    logits_LTE, weights_LTK, ids_LTK = (torch.stack([layer[part] for layer in layers]) for part in range(3))
    # Our own routers say what they dropped; others drop nothing.
    dropped_LTK = torch.stack([layer[3] if len(layer) > 3 else torch.zeros_like(layer[2]) for layer in layers]).bool()
    probs_LTE, weights_LTK = logits_LTE.float().softmax(dim=-1), weights_LTK.float()
    order_LTK = probs_LTE.gather(-1, ids_LTK).argsort(dim=-1, descending=True, stable=True)  # not every router sorts them
    ids_LTK, weights_LTK, dropped_LTK = (part.gather(-1, order_LTK) for part in (ids_LTK, weights_LTK, dropped_LTK))
    chosen_LTK = probs_LTE.gather(-1, ids_LTK).masked_fill(dropped_LTK, 0.0)
    expected_LTK, found_LTK = (part / part.sum(-1, keepdim=True).clamp(min=1e-9) for part in (chosen_LTK, weights_LTK))
    if not torch.allclose(expected_LTK, found_LTK, atol=CLOSE):
        raise RoutingError("the routers do not weigh experts by the softmax of their logits, so their probabilities are not known")
    return {"probs_LTE": probs_LTE, "ids_LTK": ids_LTK, "weights_LTK": weights_LTK, "dropped_LTK": dropped_LTK}


def _generate(model: PreTrainedModel, inputs: dict[str, Any], max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """([B, S + N] ids of the prompts and of what the model read of its N + 1 new tokens, [B, N] bool: those up to the end of an answer)"""
    ids_BS = write_greedily(model, inputs, max_new_tokens)[:, :-1]
    new_BS = ids_BS[:, inputs["input_ids"].shape[1] :]
    ends_BS = torch.isin(new_BS, torch.tensor(end_tokens(model), device=new_BS.device, dtype=new_BS.dtype))
    # What comes after the first end pads the row.
    return ids_BS, (ends_BS.cumsum(1) - ends_BS.long()) == 0


def _special_ids(model: PreTrainedModel, tokenizer: Any) -> Collection[int]:
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    config = model.config.get_text_config()
    return {number for name in ("bos", "eos", "pad") for number in as_list(getattr(config, f"{name}_token_id"))}


def _pieces(tokenizer: Any, token_ids_T: Tensor, kinds_T: Tensor) -> tuple[str, ...]:
    return tuple(
        "" if kind == IMAGE else tokenizer.decode([token]) for token, kind in zip(token_ids_T.tolist(), kinds_T.tolist(), strict=True)
    )
