"""Measure training steps per second alone and beside two busy processes, with OpenMP's waiting threads spinning, which is OpenMP's default,
and sleeping, which is the default of the command line. The four variants take turns.

    python benchmarks/busy.py runs/busy --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_llava.common.files import read_lines

REPOSITORY = Path(__file__).parents[1]
COMMAND = Path(sys.executable).parent / "moe-llava"
WAITS = {"spinning": {"GOMP_SPINCOUNT": "300000"}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}  # the first spells out libgomp's default


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def steps_per_second(out: Path, steps: int, wait: dict[str, str]) -> float:
    """Measure stage II of the digits recipe, without its first step."""
    settings = {"model": out / "base", "output": out / "run", "save_steps": 10**6, "logging_steps": steps}
    settings |= {"stage1.optimisation.max_steps": 1, "stage2.optimisation.max_steps": steps}
    for stage, name in (("stage1", "captions"), ("stage2", "train")):
        settings[f"{stage}.data"] = f"{{file: {out}/data/{name}.json, images: {out}/data/images}}"
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    shutil.rmtree(out / "run" / "stage2", ignore_errors=True)
    command = [COMMAND, "train", REPOSITORY / "recipes" / "digits.yaml", "--stage", "1", "--stage", "2", "--resume", *changes]
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    subprocess.run([str(word) for word in command], check=True, env=environment | wait, stdout=subprocess.DEVNULL)
    first, last = (line for line in read_lines(out / "run" / "stage2" / "log.jsonl") if "loss" in line)
    return (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--others", type=int, default=2)
    arguments = parser.parse_args()
    subprocess.run([COMMAND, "digits", arguments.out, "--train-images", "200", "--test-images", "4"], check=True)
    found: dict[tuple[str, int], list[float]] = {(name, others): [] for name in WAITS for others in (0, arguments.others)}
    for _ in range(arguments.rounds):
        for (name, others), speeds in found.items():
            with busy(others):
                speeds.append(steps_per_second(arguments.out, arguments.steps, WAITS[name]))
    print(f"{os.cpu_count()} cores, {arguments.rounds} rounds of {arguments.steps} steps; steps per second: median (lowest - highest)")
    for (name, others), speeds in found.items():
        print(f"{name}, {others} other processes: {statistics.median(speeds):.2f} ({min(speeds):.2f} - {max(speeds):.2f})")


if __name__ == "__main__":
    main()
