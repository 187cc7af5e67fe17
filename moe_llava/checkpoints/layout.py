"""Fill a model from the tensors of the published layout: where the rows of each parameter are stored, whether all are there, and the
copying.

The plan is made backwards: for each parameter of the model, families.py has the name in the checkpoint. So no parameter can be forgotten,
and what is left over in the checkpoint is known by name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.families import COEFFICIENT, EXPERT, PROJECTOR, RESIDUAL, ROUTER, TOWER, UNUSED, Family
from moe_llava.checkpoints.weights import StoredTensor
from moe_llava.common.errors import CheckpointError
from moe_llava.common.progress import with_bar
from moe_llava.model import MoeLlavaForConditionalGeneration, SparseMlp
from moe_llava.model.ffn import FFN_FORMS


@dataclass(frozen=True)
class Piece:
    """Rows `part` of `parts` of the stored `key` fill rows `slot` of `slots` of the parameter `target`, or of one expert's slice of it."""

    key: str
    target: str
    part: int = 0
    parts: int = 1
    expert: int | None = None
    slot: int = 0
    slots: int = 1

    def view(self, target: Tensor) -> Tensor:
        """Return the rows of `target` that this piece fills."""
        return (target if self.expert is None else target[self.expert]).chunk(self.slots)[self.slot]

    def stored_shape(self, target: Tensor) -> tuple[int, ...]:
        """Return the shape that the whole stored tensor must have."""
        rows, *others = self.view(target).shape
        return (rows * self.parts, *others)


def plan(model: LlavaForConditionalGeneration, family: Family) -> list[Piece]:
    """Return the pieces of every parameter of `model`, which is on the meta device."""
    sparse = isinstance(model, MoeLlavaForConditionalGeneration)
    mlps: dict[int, SparseMlp] = model.sparse_mlps() if sparse else {}
    pieces = []
    for target in model.state_dict():
        _, _, name = target.partition("model.")
        part, _, rest = name.partition(".")
        if target.startswith("lm_head."):
            pieces.append(Piece(target, target))
        elif part == "multi_modal_projector":
            module, _, parameter = rest.partition(".")
            pieces.append(Piece(f"{family.backbone}.{PROJECTOR[module]}.{parameter}", target))
        elif part == "vision_tower":
            pieces.append(Piece(f"{family.backbone}.{TOWER}.{rest.removeprefix('vision_model.')}", target))
        else:
            layer = int(rest.split(".")[1]) if rest.startswith("layers.") else None
            if layer in mlps and ".mlp." in rest:
                pieces += _sparse_pieces(family, target, layer, rest.split(".mlp.")[1], mlps[layer])
            else:
                key, index, parts = family.stored_name(rest)
                pieces.append(Piece(key, target, index, parts))
    return pieces


def _sparse_pieces(family: Family, target: str, layer: int, name: str, mlp: SparseMlp) -> list[Piece]:
    """Return the pieces of one parameter, called `name` within the SparseMlp of `layer`."""
    form = next(form for form in FFN_FORMS if form.experts is type(mlp.experts))

    def ffn(part: str, module: str) -> str:
        """Return the key of a dense FFN's parameter, if that FFN is the submodule `module` of `mlp`."""
        before, after = family.stored_name(f"layers.{layer}.mlp.{part}")[0].split(".mlp.")
        return f"{before}.mlp.{module}.{after}"

    before = ffn(next(iter(form.dense_names)), "").split(".mlp.")[0]
    part, _, rest = name.partition(".")
    if part == "router":
        return [Piece(f"{before}.mlp.{ROUTER}", target)]
    if part == "coefficient":
        return [Piece(f"{before}.mlp.{COEFFICIENT}.{rest}", target)]
    if part == "residual_mlp":
        return [Piece(ffn(rest, RESIDUAL), target)]
    sources = form.stacked[rest]
    return [
        Piece(ffn(source, EXPERT.format(expert)), target, expert=expert, slot=slot, slots=len(sources))
        for expert in range(mlp.experts.num_experts)
        for slot, source in enumerate(sources)
    ]


def unused(names: Collection[str]) -> dict[str, list[str]]:
    """Return reason -> the stored names that nothing uses."""
    found = {reason: sorted(filter(pattern.fullmatch, names)) for reason, pattern in UNUSED.items()}
    return {reason: matching for reason, matching in found.items() if matching}


def check(pieces: list[Piece], tables: dict[str, StoredTensor], model: LlavaForConditionalGeneration, source: str) -> None:
    """Raise CheckpointError, listing every missing, unexpected and misshapen name, unless `tables` holds exactly what `pieces` need."""
    targets = model.state_dict()
    wanted = {piece.key: piece.stored_shape(targets[piece.target]) for piece in pieces}
    problems = [f"missing: {key} {list(wanted[key])}" for key in sorted(wanted.keys() - tables.keys())]
    problems += [f"unexpected: {key} {list(tables[key].shape)}" for key in sorted(tables.keys() - wanted.keys())]
    problems += [
        f"misshapen: {key} is {list(tables[key].shape)}, but the configuration asks for {list(wanted[key])}"
        for key in sorted(wanted.keys() & tables.keys())
        if tables[key].shape != wanted[key]
    ]
    problems += [f"not floating point: {key} is {tables[key].dtype}" for key in sorted(tables) if not tables[key].dtype.is_floating_point]
    if problems:
        raise CheckpointError(f"{source} does not hold the weights that config.json describes:\n  " + "\n  ".join(problems))


def read(
    pieces: list[Piece], tables: dict[str, StoredTensor], model: LlavaForConditionalGeneration, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return name -> tensor in `dtype`. Files are read one after another, in the order in which the tensors are stored."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {target: torch.empty(shapes[target], dtype=dtype) for target in dict.fromkeys(piece.target for piece in pieces)}
    in_order = sorted(pieces, key=lambda piece: (tables[piece.key].file, tables[piece.key].offset))
    for piece in with_bar(in_order, "reading weights"):
        tables[piece.key].rows(piece.part, piece.parts).read_into(piece.view(state[piece.target]))
    return state
