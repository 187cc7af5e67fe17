"""Two real processes under torchrun, over gloo, do what one does with twice the batch."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import load_file

from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from tests.conftest import REPOSITORY

BIN = Path(sys.executable).parent


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


MAIN_OF_TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}


def torchrun_command(*arguments, processes=2, restarts=0):
    options = ["--standalone", "--nproc_per_node", processes, "--max-restarts", restarts, "--no-python"]
    return [str(word) for word in (BIN / "torchrun", *options, BIN / "moe-llava", *arguments)]


def torchrun(*arguments, **options):
    command = torchrun_command(*arguments, **options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for_step(log, step, run, seconds=120):
    """Wait until a running stage has logged a step."""
    end = time.monotonic() + seconds
    while not log.exists() or len(log.read_text().splitlines()) < step:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, f"no step {step} in {log}"
        time.sleep(0.05)


def read_log(folder):
    """The steps of a stage."""
    return [entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in entry]


@pytest.fixture
def make_recipe(write_recipe, tmp_path):
    """name -> a recipe file of its own; `per_device` of the 4 records of a step, every third record without its image."""
    file = write_recipe()
    raw = yaml.safe_load(file.read_text())
    data = raw["stage2"]["data"]
    records = json.loads(Path(data["file"]).read_text())
    for record in records[::3]:
        record.pop("image")
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>\n", "")
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(records))

    def make(name, per_device, checkpointing, coefficient=1.0):
        recipe = json.loads(json.dumps(raw)) | {"output": str(tmp_path / name)}
        for stage in ("stage1", "stage2", "stage3"):
            recipe[stage]["optimisation"] |= {"per_device_batch_size": per_device, "gradient_checkpointing": checkpointing}
            if stage != "stage1":
                recipe[stage]["data"]["file"] = str(mixed)
        recipe["stage3"]["moe"] |= {"router_aux_loss_coef": coefficient, "router_bias_rate": 0.01}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make


def test_processes_wait_for_the_main_one_for_hours(write_recipe, monkeypatch):
    """NCCL's own limit is ten minutes: less than a large model takes to be written and hashed."""
    waits = []

    def refuse(*arguments, timeout=timedelta(minutes=10), **settings):
        waits.append(timeout)
        raise ConnectionError

    monkeypatch.setattr("torch.distributed.init_process_group", refuse)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name, value in MAIN_OF_TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError):
        train(load_recipe(write_recipe()), [1], resume=False, console=Console(quiet=True))
    assert [wait >= timedelta(hours=2) for wait in waits] == [True]


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow, id=""), pytest.param(True, id="checkpointing")])
def test_two_processes_are_one_with_twice_the_batch(make_recipe, tmp_path, checkpointing):
    """Also where a process has images and its neighbour has none."""
    train(load_recipe(make_recipe("one", 4, checkpointing)), [1, 2, 3], resume=False, console=Console(quiet=True))
    printed = torchrun("train", make_recipe("two", 2, checkpointing))
    assert printed.count("stage3 3/3 loss") == 1
    for stage in ("stage1", "stage2", "stage3"):
        expected, found = (read_log(tmp_path / name / stage) for name in ("one", "two"))
        assert len(expected) == len(found) == 3
        for before, after in zip(expected, found, strict=True):
            assert after["loss"] == pytest.approx(before["loss"], abs=1e-5), stage
            assert after["grad_norm"] == pytest.approx(before["grad_norm"], abs=1e-5), stage
            assert after.get("balance_loss") == pytest.approx(before.get("balance_loss"), abs=1e-5), stage
        expected, found = (load_file(tmp_path / name / stage / "model.safetensors") for name in ("one", "two"))
        assert expected.keys() == found.keys()
        assert max((expected[name] - found[name]).abs().max().item() for name in expected) < 1e-5, stage
        assert not list((tmp_path / "two").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1], ids=["main", "other"])
def test_a_run_that_lost_a_process_continues_from_its_save(write_recipe, tmp_path, lost):
    """torchrun restarts both, without --resume."""
    file = write_recipe(stage1__optimisation__max_steps=40, stage1__optimisation__per_device_batch_size=2)
    command = torchrun_command("train", file, "--stage", "1", restarts=1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=ENVIRONMENT) as run:
        wait_for_step(tmp_path / "run" / ".stage1" / "log.jsonl", 5, run)
        workers = sorted(psutil.Process(run.pid).children(), key=lambda process: int(process.environ()["RANK"]))
        workers[lost].send_signal(signal.SIGKILL)
        printed, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert "stage1 resumes after step" in printed
    assert not list((tmp_path / "run").glob(".*"))
    found, log = load_file(tmp_path / "run" / "stage1" / "model.safetensors"), read_log(tmp_path / "run" / "stage1")
    assert [entry["step"] for entry in log] == list(range(1, 41))
    torchrun("train", file, "--stage", "1", "--set", f"output={tmp_path / 'whole'}")
    expected = load_file(tmp_path / "whole" / "stage1" / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
