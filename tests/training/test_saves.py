"""A run is stopped in every way there is, and loses nothing that was saved."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.common.files import read_lines
from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from moe_llava.training.saves import SaveError, keep, rewind, saves, saving
from tests.conftest import REPOSITORY

QUIET = Console(quiet=True)
BIN = Path(sys.executable).parent


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def command(processes, *arguments):
    """`moe-llava` in the background, or as many of it as torchrun starts, in a process group of its own."""
    torchrun = [BIN / "torchrun", "--standalone", "--nproc_per_node", str(processes), "--no-python"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [str(part) for part in [*torchrun, BIN / "moe-llava", *arguments]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)


def wait_for(step, work, process):
    """Until the log of a stage has come to `step`."""
    for _ in range(1200):
        if any(line["step"] >= step for line in read_lines(work / "log.jsonl")):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_as_one_that_was_left_alone(write_recipe, tmp_path, processes):
    """Also in an epoch whose order depends on its number: 24 pictures, batches of 4, a few epochs."""
    changes = {"group_by_length": True, "per_device_batch_size": 4 // processes, "max_steps": 60}
    file = write_recipe(save_steps=7, **{f"stage1__optimisation__{key}": value for key, value in changes.items()})
    stage = tmp_path / "run" / "stage1"
    undisturbed = command(processes, "train", file, "--stage", "1", "--set", f"output={tmp_path / 'whole'}")
    assert undisturbed.wait(timeout=300) == 0, undisturbed.stderr.read()
    for step in (9, 30):
        run = command(processes, "train", file, "--stage", "1", "--resume")
        wait_for(step, stage.with_name(".stage1"), run)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert not stage.exists()
    run = command(processes, "train", file, "--stage", "1", "--resume")
    assert run.wait(timeout=300) == 0, run.stderr.read()
    assert same(weights(tmp_path / "whole" / "stage1"), weights(stage))
    log = read_lines(stage / "log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 61))
    seconds = [line["seconds"] for line in log]
    assert seconds == sorted(seconds)  # of all runs together
    assert not list(stage.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGTERM), pytest.param(1, signal.SIGINT, marks=pytest.mark.slow), pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_run_that_is_asked_to_stop_saves_and_says_so(write_recipe, tmp_path, processes, number):
    file = write_recipe(save_steps=1000, stage1__optimisation__max_steps=2000, stage1__optimisation__per_device_batch_size=4 // processes)
    work = tmp_path / "run" / ".stage1"
    run = command(processes, "train", file, "--stage", "1")
    wait_for(3, work, run)
    run.send_signal(number)
    if number == signal.SIGTERM:
        run.send_signal(number)  # as a scheduler and torchrun do; once is enough
    _, errors = run.communicate(timeout=120)
    (save,) = saves(work)
    step = int(save.name.removeprefix("checkpoint-"))
    assert step >= 3
    assert f"stage1 stopped as asked after step {step} of 2000: continue with --resume" in errors
    assert "Traceback" not in errors or processes > 1  # torchrun tells of its own
    assert run.returncode != 0 if processes > 1 else run.returncode == 128 + signal.SIGTERM


def test_a_full_disk_loses_nothing(write_recipe, tmp_path):
    """The kernel refuses to write files beyond a size, as it does when a disk is full."""
    file = write_recipe(save_steps=2, save_total_limit=5, stage1__optimisation__max_steps=4)
    recipe = load_recipe(file)
    work = tmp_path / "run" / ".stage1"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class FullAfterTwoSteps(Console):
        def print(self, *things, **settings):
            if "stage1 3/4" in str(things):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))

    try:
        with pytest.raises(SaveError, match=r"step 4 could not be saved in .*; .*checkpoint-2 is whole: continue from it with --resume"):
            train(recipe, [1], resume=False, console=FullAfterTwoSteps(file=open(os.devnull, "w")))  # noqa: SIM115
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [save.name for save in saves(work)] == ["checkpoint-2"]
    assert not (work / ".saving").exists()
    (stage,) = train(recipe, [1], resume=True, console=QUIET)
    (whole,) = train(load_recipe(file, [f"output={tmp_path / 'whole'}"]), [1], resume=False, console=QUIET)
    assert same(weights(stage), weights(whole))


def test_only_the_last_saves_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        with saving(tmp_path, "a step") as folder:
            (folder / f"checkpoint-{step}").mkdir(parents=True)
            keep(folder, tmp_path, 2)
    assert [save.name for save in saves(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]

    def fail():
        with saving(tmp_path, "a step") as folder:
            (folder / "checkpoint-12").mkdir(parents=True)
            raise OSError("no space")

    with pytest.raises(SaveError, match=r"a step could not be saved in .*: no space; .*checkpoint-11 is whole: continue"):
        fail()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_log_is_rewound_to_the_save(tmp_path):
    file = tmp_path / "log.jsonl"
    rewind(file, 3)
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(6)) + '{"step": 6, "lo')
    rewind(file, 3)
    assert [line["step"] for line in read_lines(file)] == [0, 1, 2, 3]


def test_a_folder_in_which_nothing_began_is_no_obstacle(write_recipe, tmp_path):
    (tmp_path / "run" / ".stage1").mkdir(parents=True)
    train(load_recipe(write_recipe()), [1], resume=True, console=QUIET)


def data_with_bad_records(tiny_base, folder, bad, of):
    """`of` records in all, of which the first `bad` name a picture that cannot be decoded."""
    images = tiny_base / "data" / "images"
    records = json.loads((tiny_base / "data" / "captions.json").read_text())
    (folder / "broken.png").write_bytes(b"no image")
    lines = []
    for number in range(of):
        record = dict(records[number % len(records)])
        record["image"] = str(folder / "broken.png") if number < bad else str(images / record["image"])
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return {"file": str(folder / "data.jsonl"), "images": str(folder)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_stops_the_run_by_name(write_recipe, tiny_base, tmp_path, workers):
    data = data_with_bad_records(tiny_base, tmp_path, 300, 300)
    with pytest.raises(ValueError, match=r"^line \d+ of .*data.jsonl names the image .*broken.png, which cannot be decoded"):
        train(load_recipe(write_recipe(stage1__data=data, dataloader_workers=workers)), [1], resume=False, console=QUIET)


def test_bad_records_are_skipped_and_counted_if_they_are_few(write_recipe, tiny_base, tmp_path):
    data = data_with_bad_records(tiny_base, tmp_path, 3, 20)
    steps = {"stage1__optimisation__max_steps": 5, "stage1__optimisation__per_device_batch_size": 1}
    file = write_recipe(stage1__data=data, on_bad_record="skip", **steps)
    (stage,) = train(load_recipe(file), [1], resume=False, console=QUIET)
    skipped = read_lines(stage / "skipped.jsonl")
    assert sorted(line["problem"].split(" of ")[0] for line in skipped) == ["line 1", "line 2", "line 3"]
    logged = [line for line in read_lines(stage / "log.jsonl") if "loss" in line]
    assert logged[-1]["skipped"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(stage).values())

    data = data_with_bad_records(tiny_base, tmp_path, 12, 20)
    file = write_recipe(stage1__data=data, on_bad_record="skip", output=str(tmp_path / "more"), **steps)
    with pytest.raises(
        ValueError, match=r"1[12] of the 20 records that the run uses could not be read, more than 50%: .*skipped.jsonl names them"
    ):
        train(load_recipe(file), [1], resume=False, console=QUIET)


def test_a_recipe_that_is_written_is_one_that_is_read(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(save_total_limit=3, on_bad_record="skip"))
    (stage,) = train(recipe, [1], resume=False, console=QUIET)
    assert load_recipe(stage / "recipe.yaml") == recipe
    assert yaml.safe_load((stage / "recipe.yaml").read_text())["save_total_limit"] == 3


def test_a_run_that_was_killed_while_it_was_tidying_up(write_recipe, tmp_path):
    """The finished stage has its name before its saves go."""
    file = write_recipe()
    (stage,) = train(load_recipe(file), [1], resume=False, console=QUIET)
    left = stage / "checkpoint-2"
    left.mkdir()
    (left / "optimizer.pt").write_bytes(b"half of it")
    assert train(load_recipe(file), [1], resume=True, console=QUIET) == [stage]
    assert not left.exists()


def test_saves_are_kept_if_asked(write_recipe):
    """A save is a checkpoint, which has its processor: others can look at what happened during training."""
    file = write_recipe(keep_saves=True, save_steps=2, save_total_limit=9, stage1__optimisation__max_steps=4)
    for _ in range(2):
        (stage,) = train(load_recipe(file), [1], resume=True, console=QUIET)
        assert [save.name for save in saves(stage)] == ["checkpoint-2", "checkpoint-4"]
    for save in saves(stage):
        model, processor = load_checkpoint(save)
        assert processor.image_token
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_checkpoint(stage)[0].state_dict().items())


def test_a_run_does_not_go_on_with_other_records(write_recipe, tiny_base, tmp_path, monkeypatch):
    data = data_with_bad_records(tiny_base, tmp_path, 0, 40)
    file = write_recipe(stage1__data=data, stage1__optimisation__max_steps=4)

    class Ended(Exception):
        pass

    def end(*arguments):
        raise Ended

    with monkeypatch.context() as patch:
        patch.setattr("moe_llava.training.run.finish", end)
        with pytest.raises(Ended):
            train(load_recipe(file), [1], resume=False, console=QUIET)
    lines = Path(data["file"]).read_text().splitlines()
    Path(data["file"]).write_text("\n".join(lines[::-1]))
    with pytest.raises(ValueError, match=r"\.stage1 was begun on 40 records, and its data files now hold others \(40\): put them back"):
        train(load_recipe(file), [1], resume=True, console=QUIET)
    Path(data["file"]).write_text("\n".join(lines))
    os.utime(data["file"], ns=(1, 1))
    train(load_recipe(file), [1], resume=True, console=QUIET)


@pytest.mark.parametrize("kind", ["a file", "an empty folder"])
def test_something_else_in_the_way(write_recipe, tmp_path, kind):
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / "stage1"
    place.mkdir() if kind == "an empty folder" else place.write_text("x")
    with pytest.raises(ValueError, match=r"stage1 is in the way: it is no stage that was finished or begun"):
        train(load_recipe(write_recipe()), [1], resume=True, console=QUIET)


def test_a_resumed_run_saves_and_logs_as_its_own_recipe_says(write_recipe, tmp_path, stopping):
    settings = ["logging_steps=1", "save_steps=5", "save_total_limit=9"]
    file = write_recipe(logging_steps=100, stage1__optimisation__max_steps=7)
    with stopping(3):
        train(load_recipe(file), [1], resume=False, console=QUIET)
    with stopping(6):
        train(load_recipe(file, settings), [1], resume=True, console=QUIET)
    assert [save.name for save in saves(tmp_path / "run" / ".stage1")] == ["checkpoint-2", "checkpoint-5"]
    (stage,) = train(load_recipe(file, settings), [1], resume=True, console=QUIET)
    assert [line["step"] for line in read_lines(stage / "log.jsonl") if "loss" in line] == [1, 3, 4, 5, 6, 7]


def test_a_save_between_two_logged_steps_changes_no_logged_number(write_recipe, put_stage, tmp_path, stopping):
    """Of a sparse model, whose numbers are sums over steps and batches; the save of step 2 is amid the steps 2 to 4."""
    file = write_recipe(logging_steps=4, stage3__optimisation__max_steps=5, stage3__optimisation__per_device_batch_size=2)
    put_stage(2)
    lines = []
    for stopped in (False, True):
        if stopped:
            with stopping(3):
                train(load_recipe(file), [3], resume=False, console=QUIET)
        (stage,) = train(load_recipe(file), [3], resume=True, console=QUIET)
        lines.append([line for line in read_lines(stage / "log.jsonl") if "loss" in line])
        stage.rename(tmp_path / f"kept-{stopped}")
    times = ("tokens_per_second", "seconds", "peak_memory")
    plain = [[{key: value for key, value in line.items() if key not in times} for line in found] for found in lines]
    assert [line["step"] for line in plain[0]] == [1, 4, 5]
    assert plain[0] == plain[1]
    assert lines[0][1]["tokens_per_second"] > 0
