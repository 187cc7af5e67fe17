"""Kill a stage at its file operations, one after another, resume it each time, and compare what it ends with.

    python -m tests.training.killed RECIPE STAGE FOLDER [NUMBER ...]

FOLDER holds the stages before in `before/`. Without numbers, a run is killed at every operation; negative numbers count from the last one.
Each run is a fork of this process, which has imported everything and computed nothing.

An operation is a rename, a removal, a new folder, or a file that is written. A run that dies while it writes a file leaves half of it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils
from rich.console import Console

from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}
TIMES = {"tokens_per_second", "seconds", "peak_memory", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


class Operations:
    """Counts the operations in a folder, and ends the process at the one with the number `last`."""

    def __init__(self, root, last):
        self.root, self.last, self.number = str(root), last, 0
        self.busy = False  # within an operation: what it does itself is part of it

    def watch(self):
        sys.addaudithook(self.hear)
        for module, name in ((torch, "save"), (safetensors.torch, "save_file"), (transformers.modeling_utils, "safe_save_file")):
            setattr(module, name, self.whole(getattr(module, name)))

    def hear(self, event, arguments):
        if event not in EVENTS or self.busy:
            return
        if event == "open":
            file, _, flags = arguments
            if isinstance(file, int) or not (flags & (os.O_WRONLY | os.O_RDWR)):
                return
            self.count(file, lambda: self.write_half(file))
        elif event in ("os.remove", "os.rmdir") and arguments[-1] != -1:
            self.count(self.root)  # within a folder that is removed
        else:
            self.count(arguments[0])

    def whole(self, save):
        """Returns `save` as one operation."""

        def counted(tensors, file, *arguments, **settings):
            def write():
                save(tensors, file, *arguments, **settings)
                os.truncate(file, os.path.getsize(file) // 2)

            self.count(file, write)
            self.busy = True
            save(tensors, file, *arguments, **settings)
            self.busy = False

        return counted

    def write_half(self, file):
        with open(file, "a") as stream:
            stream.write('{"step": 1, "lo')

    def count(self, file, half=lambda: None):
        if not os.path.abspath(os.fsdecode(file)).startswith(self.root):
            return
        self.number += 1
        if self.number == self.last:
            self.busy = True
            half()
            os._exit(9)


def run(recipe, stage, output, resume, last=0):
    """Train in a child process. Returns how many operations there were, None if the child was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        operations = Operations(output, last)
        operations.watch()
        status = 1
        try:
            train(load_recipe(recipe, [f"output={output}"]), [stage], resume, Console(quiet=True))
            os.write(writing, str(operations.number).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as told:
        number = told.read()
    if os.waitstatus_to_exitcode(status) not in ((0, 9) if last else (0,)):
        raise AssertionError(f"a run failed: {output}, killed at {last}")
    return int(number) if number else None


def prepare(folder, before):
    folder.mkdir()
    for stage in sorted(before.iterdir()):
        (folder / stage.name).symlink_to(stage)


def left(output, stage):
    """Everything that a run leaves, by file: tensors, logs without times, other files by name alone."""
    found = {"output": sorted(path.name for path in output.iterdir())}
    for file in sorted(path for path in stage.rglob("*") if path.is_file()):
        name = str(file.relative_to(stage))
        if file.suffix == ".safetensors":
            found[name] = safetensors.torch.load_file(file)
        elif name == "log.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines if "loss" in line]
        else:
            found[name] = file.read_bytes() if name in ("config.json", "records.json") else None
    return found


def differences(first, second):
    wrong = sorted(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        one, two = first[name], second[name]
        if name.endswith(".safetensors"):
            tensors = [key for key in one.keys() | two.keys() if key not in one or key not in two or not torch.equal(one[key], two[key])]
            wrong += [f"{name}: {key}" for key in tensors]
        elif one != two:
            wrong.append(f"{name}: {one} and {two}")
    return wrong


def main(recipe, stage, folder, *numbers):
    folder, stage = Path(folder), int(stage)
    name = "dense" if load_recipe(recipe).stage3.dense else f"stage{stage}"
    prepare(folder / "whole", folder / "before")
    total = run(recipe, stage, folder / "whole", resume=False)
    expected = left(folder / "whole", folder / "whole" / name)
    chosen = [int(number) % (total + 1) for number in numbers] or range(1, total + 1)
    for number in chosen:
        output = folder / "killed"
        prepare(output, folder / "before")
        killed = run(recipe, stage, output, resume=True, last=number) is None
        run(recipe, stage, output, resume=True)
        wrong = differences(expected, left(output, output / name))
        if wrong or not killed:
            raise AssertionError(f"killed at operation {number} of {total}: {killed}; what differs: {wrong}")
        shutil.rmtree(output)
        print(f"killed at operation {number} of {total}: no difference", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
