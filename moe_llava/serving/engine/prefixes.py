"""Keys and values of the beginnings of prompts, for later prompts that begin the same: with the same tokens, images and videos.

A prompt is divided into blocks. The first one ends with the last token of an image or video, those after its patches included, because
models compute them differently without its pixels; a block of text has BLOCK tokens. The key of a block is a digest of everything in the
prompt up to its end.

Shapes: S tokens, C keys and values of all layers (see `states_of`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_llava.data.batches import TOKEN_INPUTS
from moe_llava.serving.engine.requests import Prompt

BLOCK = 16


@dataclass(frozen=True)
class Block:
    """A block of a prompt. `end`: the number of tokens up to its end."""

    key: bytes
    start: int
    end: int


def media_digest(inputs: Mapping[str, Tensor]) -> bytes:
    """Return a digest of the images and videos in the inputs of a prompt. It takes 1 ms per MB: compute it where nothing waits."""
    digest = hashlib.sha256()
    for name in sorted(inputs.keys() - TOKEN_INPUTS):
        values = inputs[name].contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def blocks_of(prompt: Prompt, media: Set[int]) -> list[Block]:
    """Return the blocks of a prompt without its last token, which is always computed. `media`: the ids of tokens of images and videos."""
    ids, digest = prompt.input_ids, hashlib.sha256(prompt.digest or media_digest(prompt.inputs))
    first = next((place + 1 for place in reversed(range(len(ids))) if ids[place] in media), BLOCK)
    blocks = []
    start = 0
    for end in range(first, len(ids), BLOCK):
        digest.update(np.array(ids[start:end]).data)
        blocks.append(Block(digest.digest(), start, end))
        start = end
    return blocks


class PrefixCache:
    """Keep up to `limit` bytes. The blocks that were not used for the longest time are dropped first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._token_bytes = 0  # of a token's states, known after the first block
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()  # [S, C] of a block

    def fitting(self, blocks: Sequence[Block]) -> list[Block]:
        """Return the blocks of a prompt that there is room for, if nothing else is kept."""
        return [block for block in blocks if block.end * self._token_bytes <= self.limit]

    def known(self, blocks: Sequence[Block]) -> int:
        """Return how many of a prompt's first tokens are here."""
        end = 0
        for block in blocks:
            if block.key not in self._states:
                break
            end = block.end
        return end

    def take(self, blocks: Sequence[Block], tokens: int) -> Tensor:
        """Return [S, C] of the first `tokens`, all of which must be here."""
        used = [block for block in blocks if block.start < tokens]
        self._touch(used)
        return torch.cat([self._states[block.key] for block in used])[:tokens]

    def keep(self, blocks: Sequence[Block], states_of: Callable[[slice], Tensor]) -> None:
        """Add the blocks of a prompt that are not here yet: `states_of` returns [S, C] of tokens of the prompt. Drop old ones beyond the
        limit."""
        if new := [block for block in blocks if block.key not in self._states]:
            start = new[0].start
            states_SC = states_of(slice(start, new[-1].end))
            self._token_bytes = states_SC[0].nbytes
            for block in new:  # copies, so that a block that is dropped frees its memory
                self._states[block.key] = states_SC[block.start - start : block.end - start].clone()
                self.nbytes += self._states[block.key].nbytes
        self._touch(blocks)
        while self.nbytes > self.limit:
            self.nbytes -= self._states.popitem(last=False)[1].nbytes

    def _touch(self, blocks: Sequence[Block]) -> None:
        """Mark blocks as used. A later block of a prompt is dropped before an earlier one, without which it is of no use."""
        for block in reversed(blocks):
            self._states.move_to_end(block.key)
