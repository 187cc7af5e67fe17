"""Options of benchmarks, checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
FORWARD, BOTH = "forward", "forward+backward"
PHASES = (FORWARD, BOTH)
# Tokens, width, FFN width. The widths of Gemma 3 270M and Qwen2.5 0.5B are among them; the last is decoding.
LAYER_SIZES = ("640x2048x5632", "1024x512x1408", "2048x256x704", "1024x640x2048", "1024x896x4864", "1x2048x5632")
MODEL_SIZES = ("tiny", "digits", "middle", "gemma", "qwen", "wide", "phi2")  # defined in pairs.py

MULTIPLE = 8  # numbers of two bytes: grouped_mm needs rows of a multiple of 16 bytes
SHARES = (0.125, 0.25, 0.5, 0.75)  # of the experts are kept in memory


class BenchError(ValueError):
    """The benchmark cannot run, or its variants do not compute the same."""


@dataclass(frozen=True)
class LayerSize:
    """A layer, and the tokens that go through it, each through `top_k` of `experts`."""

    tokens: int
    width: int
    ffn_width: int
    experts: int = 4
    top_k: int = 2

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}x{self.ffn_width}"

    @property
    def flops(self) -> int:
        """FLOPs of the forward pass, without the router: three matrix products for each expert of a token. The dense FFN has as many."""
        return 2 * self.tokens * 3 * self.width * self.top_k * self.ffn_width

    @property
    def copied_by_batched_mm(self) -> int:
        """Return how many numbers batched_mm copies: the weights of every token's experts."""
        return self.tokens * self.top_k * 3 * self.width * self.ffn_width


def parse_size(text: str, experts: int, top_k: int) -> LayerSize:
    """Read a size such as 640x2048x5632. Raise BenchError, naming what is wrong."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise BenchError(f"--size is {text!r}, but must be tokens, width and FFN width, such as {LAYER_SIZES[0]}")
    if not 1 <= top_k <= experts:
        raise BenchError(f"--top-k is {top_k}, but must lie in 1..--experts={experts}")
    tokens, width, ffn_width = (int(number) for number in text.split("x"))
    if width % MULTIPLE or ffn_width % MULTIPLE:
        raise BenchError(f"--size is {text}, but both widths must be multiples of {MULTIPLE}, for grouped_mm")
    return LayerSize(tokens, width, ffn_width, experts, top_k)


def check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise BenchError for an unknown name."""
    for name in names:
        if name not in known:
            raise BenchError(f"{option} is {name!r}, but must be one of {', '.join(known)}")


def check_file(file: Path | None) -> None:
    """Raise BenchError if no report can be written to `file`."""
    if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
        raise BenchError(f"--json is {file}, but must name a file in a folder that exists")
