"""Measure variants side by side.

Unusual here: no number stands alone. The variants of a case take turns within each round, in alternating order, so that all run under the
same load. Reports have the ratio to a limit, round by round, as median, low and high.
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
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, TypeVar

import torch

import moe_llava

TURN = 0.02  # seconds: a turn takes at least as long; quick calls are repeated
WARM_UP = 2  # calls of each variant before the first round
_STATUS = Path("/proc/self/status")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timings:
    """The times of one variant, by round: `seconds` of a call, and `processor` seconds of all threads and of started processes."""

    seconds: list[float]
    processor: list[float]


class CutShort(KeyboardInterrupt):
    """Ctrl-C after the first round. `timings`: of the complete rounds."""

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
    """Let the variants take turns for `rounds` rounds, after `warm_up` calls of each; call `advance` after each round.

    Raise CutShort at Ctrl-C, if a round is complete.
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
    """Return (seconds, processor seconds) of one of `repeats` calls."""
    _wait(device)
    processor, began = _processor_seconds(), time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - began) / repeats, (_processor_seconds() - processor) / repeats


def _processor_seconds() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(timings: Mapping[str, Timings], limit: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return for each variant its seconds, and `ratio`: its time over that of the variant `limit`; 1 is the aim, below is better. On a CPU
    also `processor_ratio`: the same for processor time, which depends less on other work on the machine."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in timings.items():
        found[name] = {"seconds": spread(one.seconds), "ratio": ratios(one.seconds, timings[limit].seconds)}
        if device.type == "cpu":
            found[name]["processor_ratio"] = ratios(one.processor, timings[limit].processor)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], limits: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios, round by round."""
    return spread([value / limit for value, limit in zip(values, limits, strict=True)])


def conditions(device: torch.device, dtype: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return machine, load, threads, dtype and versions. `packages`: further packages whose version matters."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = processor.get("model name", platform.machine())
    if "cpu family" in processor:  # of a virtual machine the name alone may hide the generation
        name += f" (family {processor['cpu family']}, model {processor['model']})"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{os.cpu_count()} x {name}",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "dtype": dtype,
        "python": platform.python_version(),
        "moe_llava": moe_llava.__version__,
        **{name: version(name) for name in ("torch", "transformers", *packages)},
        **{found.name: found.version for found in distributions(name="deepspeed")},
    }


def begin_report(bench: str, device: torch.device, dtype: str, rounds: int) -> dict[str, Any]:
    """Return a report without cases."""
    return {"bench": bench, "conditions": conditions(device, dtype), "rounds": rounds, "cases": [], "notes": []}


def add_notes(report: dict[str, Any], found: tuple[Result, list[str]]) -> Result:
    """Add to a report the notes that it does not have, and return the result they come with."""
    result, notes = found
    report["notes"] += [note for note in notes if note not in report["notes"]]
    return result


def dtype_names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def in_child(function: Callable[..., Result], *arguments: object) -> Result:
    """Run `function`, defined at a module's top level, in a new process, which has a peak memory of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def begin_peak(device: torch.device) -> int:
    """Reset the peak of `peak_memory`; return the bytes that are in use now."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak of bytes in use: of the GPU's memory, else resident in this process, which only Linux can reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        # Not ru_maxrss: on Linux that of a new process starts with the memory of its parent.
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
