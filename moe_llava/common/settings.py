"""Settings as nested mappings: flat, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "NAME VALUE, now VALUE" for each setting of either mapping that is not the same in both."""
    return [f"{name} {before.get(name)}, now {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name)]
