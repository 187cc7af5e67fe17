"""Measure memory and time of loading a checkpoint, and the time of `moe-llava chat` from its start to the answer.

The limits: reading the same weights with safetensors alone; a process that only imports torch and transformers' LLaVA. Every weight is read
once after loading, since mapped files take memory and time only then.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from moe_llava.checkpoints.load import load_checkpoint, load_on_meta, load_processor
from moe_llava.perf.measure import begin_peak, begin_report, compare, dtype_names, in_child, peak_memory, summary
from moe_llava.perf.options import BenchError
from moe_llava.perf.running import show_cases

READ, LOAD = "safetensors alone", "load_checkpoint"
IMPORT, CHAT = "import torch, transformers' LLaVA", "moe-llava chat"
CPU = torch.device("cpu")
ANSWER_TOKENS = 8


def bench_load(checkpoint: Path, image: Path | None, question: str, rounds: int, console: Console) -> dict[str, Any]:
    """Measure a checkpoint folder. `image`: to ask `question` about; default a grey one.

    Raise CheckpointError as `load_checkpoint` does, and BenchError if the folder has no safetensors files or `chat` fails.
    """
    config = load_checkpoint(checkpoint)[0].config  # reports what is wrong with the checkpoint
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise BenchError(f"checkpoint {checkpoint} has no safetensors files, whose reading would be the limit")
    report = begin_report("load", CPU, dtype_names(config.dtype), rounds)
    with tempfile.TemporaryDirectory() as folder, show_cases(report, 2, console) as running:
        if image is None:
            image = Path(folder) / "grey.png"
            Image.new("RGB", (64, 64), "grey").save(image)
        running.begin({"checkpoint": str(checkpoint)})
        loading: dict[str, Callable[[], object]] = {READ: partial(_read_files, files), LOAD: partial(_load, checkpoint)}
        found = summary(compare(loading, rounds, CPU, running), READ, CPU)
        weights = sum(file.stat().st_size for file in files)
        memory = report["memory"] = {"weights": weights, **in_child(_memory_of_loading, checkpoint)}
        memory["ratio"] = (memory["peak"] - memory["baseline"]) / weights
        running.end(READ, found)
        running.begin({"from": "start", "to": "end of the process"})
        chat = [sys.executable, "-m", "moe_llava.cli", "chat", str(checkpoint), "--image", str(image), question]
        starting: dict[str, Callable[[], object]] = {
            IMPORT: partial(_run, [sys.executable, "-c", "import torch, transformers.models.llava.modeling_llava"]),
            CHAT: partial(_run, [*chat, "--max-new-tokens", str(ANSWER_TOKENS)]),
        }
        running.end(IMPORT, summary(compare(starting, rounds, CPU, running, warm_up=1), IMPORT, CPU))
    report["notes"] = [
        f"loading takes {memory['ratio']:.2f} x its weights ({weights / 1e6:,.1f} MB) at most, beyond {memory['baseline'] / 1e6:,.0f} MB "
        "of imported modules"
    ]
    return report


def _read_files(files: list[Path]) -> None:
    for file in files:
        _touch(load_file(file).values())


def _load(checkpoint: Path) -> None:
    model, _ = load_checkpoint(checkpoint)
    _touch(model.parameters())


def _touch(weights: Iterable[Tensor]) -> None:
    for weight in weights:
        weight.detach().sum()


def _memory_of_loading(checkpoint: Path) -> dict[str, int]:
    """Return bytes: `baseline`, before the weights are loaded, with the processor and all imports; `peak`, the most afterwards."""
    load_processor(checkpoint)
    load_on_meta(checkpoint)
    gc.collect()
    baseline = begin_peak(CPU)
    _load(checkpoint)
    return {"baseline": baseline, "peak": peak_memory(CPU)}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(command[1:4])} ended with status {done.returncode}: {done.stderr.strip()}")
