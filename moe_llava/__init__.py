"""MoE-LLaVA: convert dense vision-language models to sparse ones, train, inspect, evaluate and serve them.

Names are imported when first used: `import moe_llava` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_llava._registration import register_with_transformers

if TYPE_CHECKING:
    from moe_llava.checkpoints.published import load_published
    from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaProcessor, MoeOptions, upcycle
    from moe_llava.routing.trace import trace_routing

__version__ = "0.1.0"
__all__ = [
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaProcessor",
    "MoeOptions",
    "load_published",
    "trace_routing",
    "upcycle",
]

_HOME = dict.fromkeys(__all__, "moe_llava.model") | {
    "load_published": "moe_llava.checkpoints.published",
    "trace_routing": "moe_llava.routing.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_llava' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


register_with_transformers()
