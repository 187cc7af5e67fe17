"""From the published layout's tensors to the model's: which stored rows go where, whether all is there, and the copying.

The plan is made backwards: for every parameter that the model has, families.py says what it is called in the checkpoint. So nothing can
be forgotten, and what is left over in the checkpoint is known by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.families import COEFFICIENT, EXPERT, PROJECTOR, RESIDUAL, ROUTER, TOWER, UNUSED, Family
from moe_llava.checkpoints.weights import StoredTensor
from moe_llava.common.errors import CheckpointError
from moe_llava.model import MoeLlavaForConditionalGeneration, SparseMlp
from moe_llava.model.ffn import FFN_FORMS


@dataclass(frozen=True)
class Piece:
    """Rows `part` of `parts` of the stored `key` become rows `slot` of `slots` of `target`, or of one expert's slice of it."""

    key: str
    target: str
    part: int = 0
    parts: int = 1
    expert: int | None = None
    slot: int = 0
    slots: int = 1

    def place(self, target: Tensor) -> Tensor:
        """The view of `target` that this piece fills."""
        whole = target if self.expert is None else target[self.expert]
        rows = whole.shape[0] // self.slots
        return whole[self.slot * rows : (self.slot + 1) * rows]

    def stored_shape(self, target: Tensor) -> tuple[int, ...]:
        """The shape that the whole stored tensor must have."""
        rows, *others = self.place(target).shape
        return (rows * self.parts, *others)


def plan(model: LlavaForConditionalGeneration, family: Family) -> list[Piece]:
    """Where every parameter of `model` (on the meta device) comes from."""
    sparse = isinstance(model, MoeLlavaForConditionalGeneration)
    mlps: dict[int, SparseMlp] = model.model.sparse_mlps() if sparse else {}
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
    """The pieces of one parameter, called `name` within the SparseMlp of `layer`."""
    form = next(form for form in FFN_FORMS if form.experts is type(mlp.experts))

    def ffn(part: str, place: str) -> str:
        """The key of a dense FFN's parameter when that FFN stands at `place` below `mlp`."""
        before, after = family.stored_name(f"layers.{layer}.mlp.{part}")[0].split(".mlp.")
        return f"{before}.mlp.{place}.{after}"

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


def unused(tables: dict[str, StoredTensor]) -> dict[str, list[str]]:
    """The stored names that nothing uses, by reason."""
    found = {reason: sorted(key for key in tables if pattern.fullmatch(key)) for reason, pattern in UNUSED.items()}
    return {reason: names for reason, names in found.items() if names}


def check(pieces: list[Piece], tables: dict[str, StoredTensor], model: LlavaForConditionalGeneration, source: str) -> None:
    """Raises CheckpointError, listing every missing, unexpected and misshapen name, unless `tables` holds exactly what `pieces` need."""
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


def without(pieces: list[Piece], prefix: str) -> list[Piece]:
    """`pieces` less those of the parameters whose names begin with `prefix`."""
    return [piece for piece in pieces if not piece.target.startswith(prefix)]


def read(
    pieces: list[Piece], tables: dict[str, StoredTensor], model: LlavaForConditionalGeneration, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Name -> tensor in `dtype`, read file by file in the order in which the tensors lie there."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {target: torch.empty(shapes[target], dtype=dtype) for target in dict.fromkeys(piece.target for piece in pieces)}
    in_order = sorted(pieces, key=lambda piece: (tables[piece.key].file, tables[piece.key].offset))
    console = Console(stderr=True)
    for piece in track(in_order, "reading weights", console=console, transient=True, disable=not sys.stderr.isatty()):
        tables[piece.key].rows(piece.part, piece.parts).read_into(piece.place(state[piece.target]))
    return state
