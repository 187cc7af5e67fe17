"""The network. Imports nothing else of the package, and its own files by relative imports: a saved checkpoint carries them along, and
loads with `trust_remote_code=True` where the package is not installed.

Names are imported, and registered with transformers' Auto classes, when first used; `options.py` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auto import (
        Experts,
        MoeLlavaConfig,
        MoeLlavaForConditionalGeneration,
        MoeLlavaModel,
        MoeLlavaProcessor,
        MoeOptions,
        Router,
        SparseConfig,
        SparseMlp,
        SparseModel,
        balance_loss,
        evolve_experts,
        upcycle,
        z_loss,
    )

__all__ = [
    "Experts",
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeLlavaProcessor",
    "MoeOptions",
    "Router",
    "SparseConfig",
    "SparseMlp",
    "SparseModel",
    "balance_loss",
    "evolve_experts",
    "upcycle",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".auto", __name__), name)
