"""How everything here is measured.

Unusual here: no number stands alone. The variants of a case take turns within each round, in an order that alternates, so that all see the
same machine; what is told is the ratio to a limit, round by round, as median, low and high.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

import moe_llava

TURN = 0.02  # seconds that a turn takes at least: a quick call is repeated
WARM_UP = 2  # calls of each variant before the first round
_STATUS = Path("/proc/self/status")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timings:
    """Of one variant, by round: `seconds` of a call by the clock, and `processor` seconds of all threads, and of processes
    that it started."""

    seconds: list[float]
    processor: list[float]


class CutShort(KeyboardInterrupt):
    """Ctrl-C between the first round and the last. `timings`: of the rounds that are complete."""

    def __init__(self, timings: dict[str, Timings]):
        super().__init__()
        self.timings = timings


def bench_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    advance: Callable[[int], None],
    warm_up: int = WARM_UP,
) -> dict[str, Timings]:
    """Let the variants take turns for `rounds` rounds, after `warm_up` calls of each; `advance` is called after each round.

    Raises CutShort at Ctrl-C, if a round is complete.
    """
    repeats = {}
    for name, call in variants.items():
        for _ in range(warm_up - 1):
            call()
        repeats[name] = max(1, math.ceil(TURN / max(_turn(call, 1, device)[0], 1e-9)))
    timings = {name: Timings([], []) for name in variants}
    for number in range(rounds):
        order = list(variants)[:: -1 if number % 2 else 1]
        try:
            turns = {name: _turn(variants[name], repeats[name], device) for name in order}
        except KeyboardInterrupt:
            raise CutShort(timings) if number else KeyboardInterrupt from None
        for name, (seconds, processor) in turns.items():
            timings[name].seconds.append(seconds)
            timings[name].processor.append(processor)
        advance(1)
    return timings


def _turn(call: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """(seconds, processor seconds) of one of `repeats` calls."""
    _wait(device)
    processor, began = _processor_seconds(), time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - began) / repeats, (_processor_seconds() - processor) / repeats


def _processor_seconds() -> float:
    """Of this process, and of those that it has started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(timings: Mapping[str, Timings], limit: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """Of each variant its seconds, and `ratio`, how many times as long as `limit` it took: 1 is the aim, below is better.
    `processor_ratio`, on a CPU: the same of processor time, which other work on the machine changes less."""
    told: dict[str, dict[str, Any]] = {}
    for name, one in timings.items():
        told[name] = {"seconds": spread(one.seconds), "ratio": ratios(one.seconds, timings[limit].seconds)}
        if device.type == "cpu":
            told[name]["processor_ratio"] = ratios(one.processor, timings[limit].processor)
    return told


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], limits: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios, round by round."""
    return spread([value / limit for value, limit in zip(values, limits, strict=True)])


def conditions(device: torch.device, dtype: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Machine, threads, dtype, versions, and what else the machine was doing. `packages`: others whose version matters."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "dtype": dtype,
        "python": platform.python_version(),
        "moe_llava": moe_llava.__version__,
        **{name: version(name) for name in ("torch", "transformers", *packages)},
    }


def begin_report(bench: str, device: torch.device, dtype: str, rounds: int) -> dict[str, Any]:
    """What every report has, with no cases yet."""
    return {"bench": bench, "conditions": conditions(device, dtype), "rounds": rounds, "cases": []}


def dtype_names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def in_child(function: Callable[..., Result], *arguments: object) -> Result:
    """What `function`, of a module's top level, returns in a new process of its own, whose peak memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def begin_peak(device: torch.device) -> int:
    """Lets the peak of `peak_memory` begin anew. Bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Bytes held at most: on a GPU of its memory, else of this process, resident; there, other systems than Linux cannot begin anew."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        # Not ru_maxrss: on Linux that of a new process begins with what its parent held.
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
