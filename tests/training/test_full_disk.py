"""A full disk is called a full disk, whatever library met it, and costs no save."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

from moe_llava.common.files import no_room, why_not_written
from moe_llava.common.messages import format_bytes
from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from moe_llava.training.saves import SaveError, append_line, full_disk_named
from tests.conftest import REPOSITORY

TENSORS = {"weight": torch.zeros(1_000_000)}
WRITERS = {"torch": lambda file: torch.save(TENSORS, file), "Python": lambda file: file.write_text("text")}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_known_by_what_a_library_raises(writer, tmp_path):
    """/dev/full answers as a full disk does. safetensors would put a file in its place."""
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises((OSError, RuntimeError)) as caught:
        WRITERS[writer](tmp_path / "full")
    assert no_room(caught.value)
    told = why_not_written(caught.value, tmp_path)
    assert told.startswith("the disk is full")
    assert told.endswith(f"B are free in {tmp_path}")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up: "),
        (OSError(errno.EFBIG, "File too large"), "a file would exceed the limit on file sizes (ulimit -f): "),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "the disk is full, or a quota is used up: "),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full: "),
        (OSError(errno.EACCES, "Permission denied", "a"), "[Errno 13] Permission denied: 'a'"),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_reasons(error, told, tmp_path):
    assert why_not_written(error, tmp_path).startswith(told)
    assert no_room(error) == ("free in" in why_not_written(error, tmp_path))


def test_a_limit_on_file_sizes_is_named_where_torch_hides_it(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(SaveError, match=r"the limit on file sizes is reached \(ulimit -f, 100.0 kB\)"), full_disk_named(tmp_path):
            torch.save(TENSORS, tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_log_on_a_full_disk(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(SaveError, match=rf"log.jsonl could not be saved in {tmp_path}: the disk is full: .*; nothing was saved before"):
        append_line(tmp_path / "log.jsonl", {"step": 1})


def test_sizes():
    assert [format_bytes(number) for number in (999, 1500, 2.5e6, 3e9, 4e15)] == ["999 bytes", "1.5 kB", "2.5 MB", "3.0 GB", "4,000.0 TB"]


def on_a_disk_of(number, folder, command):
    """Run a shell command with a real file system of so many bytes at `folder`, in a namespace of its own, which needs no root."""
    mount = f"mount -t tmpfs -o size={number} tmpfs {folder} && {command}"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount], cwd=REPOSITORY, capture_output=True, text=True
    )


@pytest.mark.parametrize("room", [1.5, pytest.param(2.6, marks=pytest.mark.slow)])
def test_a_real_full_disk(write_recipe, tiny_base, tmp_path, room):
    """There is room for the first save and for half of the second; or the second fits, but not the finished stage beside both."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if on_a_disk_of("1m", disk, "true").returncode:
        pytest.skip("this system lets nobody but root mount a file system")
    bytes_ = int(room * os.path.getsize(tiny_base / "base" / "model.safetensors")) + 150_000
    file = write_recipe(output=str(disk), save_total_limit=2, stage1__optimisation__max_steps=4)
    done = on_a_disk_of(bytes_, disk, f"{Path(sys.executable).parent / 'moe-llava'} train {file} --stage 1; ls -A {disk}/.stage1")
    assert "Traceback" not in done.stderr
    what, last = ("step 4", 2) if room < 2 else ("the finished stage", 4)
    assert f"error: {what} could not be saved in {disk}/.stage1: the disk is full: " in done.stderr
    assert "and the last save took " in done.stderr
    assert f"checkpoint-{last} is whole: continue from it with --resume" in done.stderr
    assert f"checkpoint-{last}" in done.stdout
    assert ".saving" not in done.stdout


def test_a_stage_that_cannot_begin_on_a_full_disk(write_recipe, tmp_path, monkeypatch):
    """Not a save, but the recipe that is written first."""

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moe_llava.training.stage.Stage.write_recipe", fail)
    with pytest.raises(SaveError, match=rf"a file could not be written in {tmp_path / 'run'}: the disk is full: .*; make room"):
        train(load_recipe(write_recipe()), [1], resume=False, console=Console(quiet=True))
