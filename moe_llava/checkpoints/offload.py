"""Offload experts: a sparse model computes while most of its experts stay on disk or, with a CUDA device, in CPU memory.

Unusual here:
- Experts are cached one by one, not by layer. One cache has slots for some experts of all layers.
- Experts compute one after another, as always without gradients, so results equal those of the "eager" backend bit by bit. Kernels may
  round depending on the address of a matrix, so an expert is put at the same remainder of ALIGNMENT as in a model that `from_pretrained`
  maps from its file.
- The experts that will be needed next are predicted from the choices of the previous router, by running statistics. A wrong prediction only
  costs time.
- Only the thread that runs the model changes the cache; other threads fill slots. So there is no lock. If an expert is needed before a
  reader has begun with it, the first thread reads it itself.

Shapes: T tokens, K experts per token, S = T * K rows, E experts, L MoE layers, D width.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moe_llava.checkpoints.files import check_checkpoint, resolve
from moe_llava.checkpoints.load import best_device, load_checkpoint
from moe_llava.checkpoints.weights import StoredTensor, find_weights, read_tables, shape_bytes
from moe_llava.common.errors import CheckpointError
from moe_llava.model import Experts
from moe_llava.model.places import find_backbone

ALIGNMENT = 64  # bytes
LIKELY = 0.5  # the lowest probability of use with which an expert is prefetched
READERS = 2  # threads: a disk serves two faster than one
MEMORY = 20  # forward passes, about, that the statistics remember

Key = tuple[int, int]  # the number of the MoE layer, from 0, and of the expert


def load_for_inference(
    path: str | Path, dtype: torch.dtype | str = "auto", keep: float | None = None
) -> tuple[PreTrainedModel, Any, ExpertCache | None]:
    """Return (model on the best device, processor, cache) as `load_offloaded` does. Without `keep`, all experts are in memory, and there is
    no cache. Raises as `load_checkpoint` and `load_offloaded` do."""
    if keep is not None:
        return load_offloaded(path, keep)
    model, processor = load_checkpoint(path, dtype)
    return model.to(best_device()), processor, None


def load_offloaded(path: str | Path, keep: float) -> tuple[PreTrainedModel, Any, ExpertCache]:
    """Return (model on the best device, processor, cache) from a folder or hub id. The device has slots for the share `keep` of the
    experts; all of them stay in CPU memory or, if the device is the CPU, in the checkpoint's files.

    Raises CheckpointError as `check_checkpoint` does, ValueError as `offload_experts` does.
    """
    check_checkpoint(path, keep)
    device = best_device()
    # Weights are mapped from their files, so those of experts are not read here.
    model, processor = load_checkpoint(path)
    return model, processor, offload_experts(model, keep, device, resolve(path, True) if device.type == "cpu" else None)


def offload_experts(model: Any, keep: float, device: torch.device, folder: Path | None = None) -> ExpertCache:
    """Take the experts out of a sparse model on the CPU, and move the rest of it to `device`. The model can then be used for inference
    only, in one thread at a time, and cannot be saved.

    Args:
        keep: the share of all experts, above 0 and at most 1, that has slots on the device.
        folder: that of the model's checkpoint, in whose files the experts stay; None to keep them in CPU memory.

    Raises ValueError if `keep` is less than two experts, if the device is not supported, if experts are adapted or quantised, or if the
    checkpoint stores them in another way.
    """
    mlps = model.sparse_mlps()
    total = len(mlps) * model.config.experts_per_layer
    kept = math.ceil(round(keep * total, 6)) if 0 < keep <= 1 else 0
    if kept < 2:
        raise ValueError(f"{keep:g} of {total} experts are to be kept, but 2 to {total} must be: one computes while the next is fetched")
    if device.type not in (("cpu", "cuda") if folder is None else ("cpu",)):
        raise ValueError(f"experts go from CPU memory to a CUDA device, and from files to CPU memory, but not to {device} from {folder}")
    for index, mlp in mlps.items():
        if not isinstance(mlp.experts, Experts) or any("." in name for name, _ in mlp.experts.named_parameters()):
            raise ValueError(f"the experts of layer {index} are adapted or quantised: only plain ones can be offloaded")
    with ExitStack() as opened:
        files = {file: opened.enter_context(file.open("rb")).fileno() for file in find_weights(folder)} if folder else {}
        tables = read_tables(files)
        layers = f"{find_backbone(model)[0]}.layers"
        stacks = [
            _in_files(mlp.experts, f"{layers}.{index}.mlp.experts.", tables, files) if folder else _in_memory(mlp.experts, device)
            for index, mlp in mlps.items()
        ]
        cache = ExpertCache(stacks, kept, model.config.experts_per_layer, model.config.experts_per_token, device)
        weakref.finalize(cache, opened.pop_all().close)
    for layer, mlp in enumerate(mlps.values()):
        mlp.experts.register_forward_pre_hook(partial(cache.expect, layer))
        mlp.experts.each = partial(cache.weights_of, layer)
        for name in stacks[layer]:
            delattr(mlp.experts, name)
    model.set_experts_implementation("eager")
    model.register_state_dict_pre_hook(_refuse_to_save)
    model.save_pretrained = _refuse_to_save  # which would write files before it takes the state dict
    model.to(device)
    return cache


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError("the experts of this model are not in memory, so it cannot be saved: copy the checkpoint that it was loaded from")


@dataclass(frozen=True)
class Stack:
    """A stacked parameter [E, ...]."""

    stored: Any

    @property
    def layout(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of one expert's slice."""
        return torch.Size(self.stored.shape[1:]), self.stored.dtype


@dataclass(frozen=True)
class FileStack(Stack):
    """A stack in a file that stays open, and so the same if another file takes its name. `stored`: a StoredTensor."""

    descriptor: int

    def begin(self, expert: int) -> int:
        """Return the offset of a slice in the file. It has the same remainder as the address of the slice in a mapped file."""
        return self.stored.offset + expert * shape_bytes(*self.layout)

    def read(self, expert: int, out: Tensor) -> None:
        """Read an expert's slice. Raises CheckpointError if the file has become shorter."""
        view, offset = out.view(-1).view(torch.uint8).numpy().data, self.begin(expert)
        while view:
            count = os.preadv(self.descriptor, [view], offset)
            if not count:
                raise CheckpointError(f"{self.stored.file} is truncated: it ends {len(view)} bytes before a tensor does")
            view, offset = view[count:], offset + count


class MemoryStack(Stack):
    """A stack in CPU memory. `stored`: a tensor."""

    def begin(self, expert: int) -> int:
        return self.stored[expert].data_ptr()

    def read(self, expert: int, out: Tensor) -> None:
        out.copy_(self.stored[expert], non_blocking=True)


Stacks = dict[str, FileStack | MemoryStack]  # the stacked parameters of a layer, by their names in its experts


def _in_memory(experts: Experts, device: torch.device) -> Stacks:
    """Return the stacks of a layer in CPU memory, pinned for CUDA, so that copies run beside computations."""
    found = {name: parameter.detach() for name, parameter in experts.named_parameters()}
    return {name: MemoryStack(stored.pin_memory() if device.type == "cuda" else stored) for name, stored in found.items()}


def _in_files(experts: Experts, prefix: str, tables: dict[str, StoredTensor], files: dict[Path, int]) -> Stacks:
    """Return the stacks of a layer in its checkpoint's files."""
    stacks: Stacks = {}
    for name, parameter in experts.named_parameters():
        stored = tables.get(prefix + name)
        if stored is None:
            raise ValueError(
                f"the checkpoint has no {prefix}{name}, under which name experts are read from its files: load the whole model"
            )
        wanted, found = (tuple(parameter.shape), parameter.dtype), (stored.shape, stored.dtype)
        if stored.loaded is not None or found != wanted:
            raise ValueError(
                f"the checkpoint must have {prefix}{name} as {wanted}, in contiguous bytes, but has {found}: experts are read as they are "
                "stored. Load the whole model, or save it again"
            )
        stacks[name] = FileStack(stored, files[stored.file])
    return stacks


@dataclass
class Counts:
    """Counts of the experts that layers needed: `hits` were in memory or being fetched, `foreseen` of these because they were prefetched,
    and `misses` were neither. `ahead`: number of prefetched experts. `bytes_read`: bytes of all that was fetched."""

    hits: int = 0
    misses: int = 0
    foreseen: int = 0
    ahead: int = 0
    bytes_read: int = 0

    def __str__(self) -> str:
        return (
            f"experts needed: {self.hits + self.misses:,}, in memory {self.hits:,}, of which prefetched {self.foreseen:,} "
            f"(of {self.ahead:,}); read {self.bytes_read / 1e6:,.1f} MB"
        )


class RouteStatistics:
    """Running means of the routers' choices, dominated by the last MEMORY forward passes.

    `used_LE`: the share of passes that used an expert. `follows_LEE[l, i, j]`: of the tokens that chose i in the MoE layer before l, the
    share that chose j in l. The layer before the first is the last one in the pass before, whose tokens are matched by their position in
    the batch. Each pass has the same weight, so that the thousands of tokens in a prompt do not outweigh decoding.
    """

    def __init__(self, layers: int, experts: int, top_k: int):
        self.used_LE = torch.full((layers, experts), top_k / experts)
        self.follows_LEE = torch.full((layers, experts, experts), top_k / experts)
        self._passes_L = torch.ones(layers)
        self._passes_LE = torch.ones(layers, experts)
        self._before_TK: Tensor | None = None

    def observe(self, layer: int, ids_TK: Tensor) -> None:
        chosen_TE = self._chosen(ids_TK)
        self.used_LE[layer] += (chosen_TE.amax(0) - self.used_LE[layer]) / (1 + self._passes_L[layer])
        self._passes_L[layer] = (self._passes_L[layer] + 1).clamp(max=MEMORY)
        if self._before_TK is not None and self._before_TK.shape == ids_TK.shape:
            before_TE = self._chosen(self._before_TK)
            tokens_E = before_TE.sum(0)
            share_EE = before_TE.T @ chosen_TE / tokens_E.clamp(min=1)[:, None]
            rate_E = (tokens_E > 0) / (1 + self._passes_LE[layer])
            self.follows_LEE[layer] += rate_E[:, None] * (share_EE - self.follows_LEE[layer])
            self._passes_LE[layer] = (self._passes_LE[layer] + (tokens_E > 0)).clamp(max=MEMORY)
        self._before_TK = ids_TK

    def chances(self, layer: int) -> Tensor:
        """Return [E] probabilities that each expert of a layer is used by the tokens last observed, in the layer before. Of a token's
        choices there, the one with the highest probability counts."""
        assert self._before_TK is not None
        chance_TE = self.follows_LEE[layer][self._before_TK].amax(1)
        return 1 - (1 - chance_TE).prod(0)

    def _chosen(self, ids_TK: Tensor) -> Tensor:
        """Return [T, E], 1 for the experts that a token chose."""
        return F.one_hot(ids_TK, self.used_LE.shape[1]).sum(1).float()


class Slot:
    """Memory for one expert: `weights` by their names, valid when `coming` is done. `ahead`: prefetched, and not used yet."""

    def __init__(self, num_bytes: int, device: torch.device):
        self.room = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.weights: dict[str, Tensor] = {}
        self.coming: Future[None] | None = None
        self.ahead = False
        self.left = torch.cuda.Event() if device.type == "cuda" else None  # the computations with the expert before

    def lay_out(self, stacks: Stacks, expert: int) -> None:
        """Make `weights` views of the memory, each at the same remainder of ALIGNMENT as its slice."""
        end = 0
        for name, stack in stacks.items():
            shape, dtype = stack.layout
            begin = end + (stack.begin(expert) - self.room.data_ptr() - end) % ALIGNMENT
            end = begin + shape_bytes(shape, dtype)
            self.weights[name] = self.room[begin:end].view(dtype).view(shape)


class ExpertCache:
    """Slots for `kept` experts of all layers. The expert whose next use is expected last is evicted: layers follow each other, and an
    expert that a pass uses with probability p is used every 1/p passes."""

    def __init__(self, stacks: list[Stacks], kept: int, experts: int, top_k: int, device: torch.device):
        self.counts = Counts()
        self.likely = LIKELY
        self.statistics = RouteStatistics(len(stacks), experts, top_k)
        self.stacks = stacks
        self._sizes = [sum(shape_bytes(*stack.layout) for stack in layer.values()) for layer in stacks]
        largest = max(self._sizes) + ALIGNMENT * len(stacks[0])
        self._free = [Slot(largest, device) for _ in range(kept)]
        self._slots: dict[Key, Slot] = {}
        self._layer = 0  # the layer that computes
        self._awaited: set[int] = set()  # its experts that have not computed yet
        self._chances: list[list[float]] = []  # [L][E]: the probability of use in the next pass of a layer
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(READERS, "experts")

    @torch.compiler.disable
    def expect(self, layer: int, experts: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        """Begin to fetch the experts that a layer needs, and those that the next layer is likely to need. This is a hook before the experts
        compute, with their arguments.

        Raises ValueError if gradients are enabled, or another backend is set.
        """
        if experts.config._experts_implementation != "eager":
            raise ValueError(f"offloaded experts compute with the backend eager, not {experts.config._experts_implementation}")
        if torch.is_grad_enabled():
            raise ValueError(
                "offloaded experts have no gradient: load the whole model to train it, or for the gradient of its inputs; otherwise run it "
                "under torch.no_grad()"
            )
        ids_TK = arguments[1].cpu()
        self.statistics.observe(layer, ids_TK)
        after = (layer + 1) % len(self.stacks)
        likely_E = self.statistics.chances(after)
        self._chances = self.statistics.used_LE.tolist()
        self._chances[after] = likely_E.tolist()
        needed = ids_TK.unique().tolist()
        self._layer, self._awaited = layer, set(needed)
        for expert in needed:
            self._ask((layer, expert))
        for expert in likely_E.argsort(descending=True)[: int((likely_E > self.likely).sum())].tolist():
            key = (after, expert)
            if key not in self._slots and self._fetch(key, self._due(key)):
                self._slots[key].ahead = True
                self.counts.ahead += 1

    def weights_of(self, layer: int) -> Callable[[int], dict[str, Tensor]]:
        """Return a function from an expert of a layer to its weights, in place of `Experts.each`."""
        return lambda expert: self.fetched((layer, expert))

    def fetched(self, key: Key) -> dict[str, Tensor]:
        """Wait for the weights of an expert that computes now, and return them."""
        self._awaited.discard(key[1])
        if key not in self._slots:
            self._fetch(key, -1.0)  # no slot was free while other experts were awaited
        slot = self._slots[key]
        if slot.coming is not None:
            # The slot counts as free until it is filled, so that a failed read is tried again.
            self._free.append(self._slots.pop(key))
            if slot.coming.cancel():
                self._fill(slot, key)
            else:
                slot.coming.result()
            slot.coming = None
            self._slots[key] = self._free.pop()
        return slot.weights

    def settle(self) -> None:
        """Wait until nothing is being fetched."""
        wait([slot.coming for slot in self._slots.values() if slot.coming is not None])

    def _ask(self, key: Key) -> None:
        slot = self._slots.get(key)
        if slot is None:
            self.counts.misses += 1
            self._fetch(key, 0.0)
            return
        self.counts.hits += 1
        self.counts.foreseen += slot.ahead
        slot.ahead = False

    def _fetch(self, key: Key, due: float) -> bool:
        """Begin to fetch an expert, and return True; or False, if that would evict one that is due as early as `due`."""
        if not self._free:
            last = max(self._slots, key=self._due)
            if self._due(last) <= due:
                return False
            self._empty(last)
        slot = self._slots[key] = self._free.pop()
        slot.lay_out(self.stacks[key[0]], key[1])
        slot.ahead = False
        slot.coming = self._reader.submit(self._fill, slot, key)
        self.counts.bytes_read += self._sizes[key[0]]
        return True

    def _empty(self, key: Key) -> None:
        """Free a slot once no reader writes to it, and record the computations that still use it."""
        slot = self._slots.pop(key)
        if slot.coming is not None:
            if slot.coming.cancel():
                self.counts.bytes_read -= self._sizes[key[0]]
            else:
                wait([slot.coming])
        if slot.left is not None:
            slot.left.record()
        self._free.append(slot)

    def _due(self, key: Key) -> float:
        """Return the number of layers after which an expert is expected to be used; 0 if the layer that computes awaits it."""
        layer, expert = key
        if layer == self._layer and expert in self._awaited:
            return 0.0
        layers = len(self.stacks)
        return (layer - self._layer - 1) % layers + 1 + layers * (1 / max(self._chances[layer][expert], 1e-6) - 1)

    @torch.inference_mode()
    def _fill(self, slot: Slot, key: Key) -> None:
        """Read an expert into a slot, in any thread. On CUDA, copies run beside computations, but after those with the slot's last
        expert."""
        layer, expert = key
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and slot.left is not None:
                self._stream.wait_event(slot.left)
            for name, stack in self.stacks[layer].items():
                stack.read(expert, slot.weights[name])
            if self._stream is not None:
                self._stream.synchronize()
