"""The rows that are decoded together, and their cache, which is padded on the left.

Shapes: S columns of the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from transformers import Cache

from moe_llava.serving.engine.submitted import Row

logger = logging.getLogger(__name__)


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
        """Append prefilled rows, with their cache. If that fails, for want of memory, the batch stays as it was."""
        if self.rows:
            longest = max(columns, self.columns)
            try:
                for layer, new in zip(self.cache.layers, cache.layers, strict=True):
                    layer.join(new, longest)
            except Exception:
                for layer in self.cache.layers:  # joined or not: its first rows and last columns, as views, which need no memory
                    layer.keep(slice(len(self.rows)), self.columns)
                raise
            self.columns = longest
        else:
            self.cache, self.columns = cache, columns
        self.rows = [*self.rows, *rows]

    def drop_finished(self) -> None:
        """Remove finished rows, and columns that no row uses any more. If that fails, for want of memory, all rows fail."""
        kept = [index for index, row in enumerate(self.rows) if not row.done]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        try:
            if kept:
                self._keep(kept)
        except Exception as error:  # some layers have lost the finished rows, others have not
            logger.exception("%d requests failed", len(kept))
            for row in self.rows:
                row.fail(error)
            self.rows = []
        if not self.rows:
            self.clear()

    def _keep(self, kept: list[int]) -> None:
        self.columns = max(row.cached for row in self.rows)
        rows = torch.tensor(kept, device=self._device)
        for layer in self.cache.layers:
            layer.keep(rows, self.columns)
