"""Kill a run of all three stages many times at random moments, resume it each time, and compare its checkpoints, bit for bit, with those of
an undisturbed run.

    python benchmarks/killed.py runs/killed --kills 20
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STAGES = ("stage1", "stage2", "stage3")
STEPS = {"stage1": 120, "stage2": 60, "stage3": 60}
NOTHING = "before the first step"


def start(out: Path, output: Path, processes: int, *options: str) -> subprocess.Popen[bytes]:
    settings = {"model": out / "base", "output": output, "save_steps": 10, "logging_steps": 1}
    for stage in STAGES:
        name = "captions" if stage == "stage1" else "train"
        settings[f"{stage}.data"] = f"{{file: {out}/data/{name}.json, images: {out}/data/images}}"
        settings |= {f"{stage}.optimisation.max_steps": STEPS[stage], f"{stage}.optimisation.group_by_length": "true"}
        settings[f"{stage}.optimisation.per_device_batch_size"] = 32 // processes
    torchrun = [BIN / "torchrun", "--standalone", "--nproc_per_node", processes, "--no-python"] if processes > 1 else []
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [*torchrun, BIN / "moe-llava", "train", REPOSITORY / "recipes" / "digits.yaml", *options, *changes]
    return subprocess.Popen([str(word) for word in command], start_new_session=True, stdout=subprocess.DEVNULL)


def where(output: Path) -> str:
    """Return the stage, and how many of its steps are logged."""
    for stage in reversed(STAGES):
        for folder in (output / stage, output / f".{stage}"):
            if folder.is_dir():
                steps = len((folder / "log.jsonl").read_text().splitlines()) if (folder / "log.jsonl").exists() else 0
                if stage == "stage1" and not steps:
                    return NOTHING
                return f"{folder.name}, {steps} steps logged{', while saving' if (folder / '.saving').exists() else ''}"
    return NOTHING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, moments = arguments.out, random.Random(arguments.seed)
    subprocess.run([BIN / "moe-llava", "digits", out, "--train-images", "200", "--test-images", "4"], check=True)
    began = time.monotonic()
    run = start(out, out / "whole", arguments.processes)
    while where(out / "whole") == NOTHING:
        time.sleep(0.1)
    first = time.monotonic() - began
    if run.wait():
        sys.exit("the undisturbed run failed")
    whole = time.monotonic() - began
    print(f"undisturbed: {whole:.0f} s, of which {first:.0f} s until its first step", flush=True)
    # So that the kills fall on all of the run, on average, its starts included.
    longest = first + 2 * (whole - first) / arguments.kills
    for number in range(1, arguments.kills + 1):
        run = start(out, out / "killed", arguments.processes, "--resume")
        time.sleep(moments.uniform(first / 2, longest))
        if run.poll() is not None:
            sys.exit(f"the run ended by itself, with status {run.returncode}, before kill {number}: try another seed")
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        print(f"kill {number}: {where(out / 'killed')}", flush=True)
    if start(out, out / "killed", arguments.processes, "--resume").wait():
        sys.exit("the killed run did not resume")
    for stage in STAGES:
        expected, found = (load_file(out / name / stage / "model.safetensors") for name in ("whole", "killed"))
        different = [name for name in expected if not torch.equal(expected[name], found[name])]
        if different or expected.keys() != found.keys():
            sys.exit(f"{stage}: {len(different)} of {len(expected)} tensors differ")
        print(f"{stage}: all {len(expected)} tensors are bitwise equal")


if __name__ == "__main__":
    main()
