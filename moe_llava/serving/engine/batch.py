"""The rows that are decoded together, and their cache, which is padded on the left.

Shapes: S columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Cache

from moe_llava.serving.engine.submitted import Row


class Batch:
    """Rows, their `cache` on `device`, and its number of `columns` S. `new_cache` returns an empty cache."""

    def __init__(self, new_cache: Callable[[], Cache], device: torch.device):
        self._new_cache = new_cache
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Remove all rows."""
        self.rows: list[Row] = []
        self.cache = self._new_cache()
        self.columns = 0

    def join(self, rows: list[Row], cache: Cache, columns: int) -> None:
        """Append prefilled rows, with their cache."""
        if self.rows:
            longest = max(columns, self.columns)
            for layer, new in zip(self.cache.layers, cache.layers, strict=True):
                layer.join(new, longest)
            self.columns = longest
        else:
            self.cache, self.columns = cache, columns
        self.rows = [*self.rows, *rows]

    def drop_finished(self) -> None:
        """Remove finished rows, and columns that no row uses any more."""
        kept = [index for index, row in enumerate(self.rows) if not row.done]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        self.rows = [self.rows[index] for index in kept]
        self.columns = max(row.cached for row in self.rows)
        rows = torch.tensor(kept, device=self._device)
        for layer in self.cache.layers:
            layer.keep(rows, self.columns)
