"""Runs on streams of shards: the bits of a run that was not stopped, bad records, and what a stream cannot do."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from moe_llava.common.errors import DataError
from moe_llava.common.files import read_lines
from moe_llava.data.shards import ShardError
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.data.shards import to_samples, write_parquet, write_tar
from tests.training.test_saves import command, same, wait_for

QUIET = Console(quiet=True)
BAD = {"9999.json": b'{"conversations": ['}


@pytest.fixture
def put_shards(tiny_base):
    """Writes the 24 captions of the tiny data as six shards into a folder or URL, and returns the pattern that names them."""

    def put(place, kind="tar", bad=False):
        images, records = tiny_base / "data" / "images", json.loads((tiny_base / "data" / "captions.json").read_text())
        assert len(records) == 24
        for shard in range(6):
            part = records[shard * 4 : shard * 4 + 4]
            if kind == "tar":
                samples = to_samples(part, images)
                write_tar(f"{place}/part-{shard}.tar", [*samples[:2], *([BAD] if bad else []), *samples[2:]])
            else:
                write_parquet(f"{place}/part-{shard}.parquet", part, images)
        return f"{place}/part-*.{kind}"

    return put


def recorded(stage):
    """The steps of a stage, without times, and what it skipped."""
    wanted = {"step", "loss", "grad_norm", "tokens", "padding", "epoch", "skipped"}
    steps = [{key: line[key] for key in wanted & line.keys()} for line in read_lines(stage / "log.jsonl") if "loss" in line]
    return steps, sorted((line["step"], line["problem"]) for line in read_lines(stage / "skipped.jsonl"))


@pytest.mark.parametrize(("kind", "workers"), [("tar", 0), ("parquet", 2)])
def test_a_stopped_run_ends_like_another(write_recipe, put_shards, tmp_path, stopping, kind, workers):
    """From the memory of the process, with workers that read ahead, and bad records that are skipped."""
    data = {"file": put_shards(f"memory://{tmp_path}", kind, bad=True), "shuffle_buffer": 3}
    optimisation = {"stage1__optimisation__max_steps": 9, "stage1__optimisation__per_device_batch_size": 2}
    file = write_recipe(stage1__data=data, on_bad_record="skip", dataloader_workers=workers, **optimisation)
    (whole,) = train(load_recipe(file), [1], resume=False, console=QUIET)
    expected, logged = load_file(whole / "model.safetensors"), recorded(whole)
    assert len(logged[0]) == 9
    assert {problem.split(" is not")[0][:11] for _, problem in logged[1]} == ({"sample 9999"} if kind == "tar" else set())
    shutil.rmtree(whole)

    for step in (3, 5):  # saves are those of steps 2 and 4
        with stopping(step):
            train(load_recipe(file), [1], resume=step > 3, console=QUIET)
    train(load_recipe(file), [1], resume=True, console=QUIET)
    assert same(expected, load_file(whole / "model.safetensors"))
    assert recorded(whole) == logged


@pytest.mark.slow
def test_two_killed_processes_end_like_others(write_recipe, put_shards, tmp_path):
    """Each with two workers, from a shared folder, with bad records that are skipped."""
    data = {"file": put_shards(f"file://{tmp_path}", bad=True), "shuffle_buffer": 3}
    optimisation = {"stage1__optimisation__max_steps": 30, "stage1__optimisation__per_device_batch_size": 2}
    file = write_recipe(stage1__data=data, on_bad_record="skip", dataloader_workers=2, save_steps=7, **optimisation)
    undisturbed = command(2, "train", file, "--stage", "1", "--set", f"output={tmp_path / 'whole'}")
    assert undisturbed.wait(timeout=300) == 0, undisturbed.stderr.read()
    stage = tmp_path / "run" / "stage1"
    for step in (9, 16):
        run = command(2, "train", file, "--stage", "1", "--resume")
        wait_for(step, stage.with_name(".stage1"), run)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert not stage.exists()
    run = command(2, "train", file, "--stage", "1", "--resume")
    assert run.wait(timeout=300) == 0, run.stderr.read()
    whole = tmp_path / "whole" / "stage1"
    assert same(load_file(whole / "model.safetensors"), load_file(stage / "model.safetensors"))
    assert recorded(whole) == recorded(stage)
    assert recorded(stage)[0][-1]["skipped"] > 5


def test_a_bad_record_stops_a_run_by_default(write_recipe, put_shards, tmp_path):
    pattern = put_shards(f"memory://{tmp_path}")
    write_tar(f"memory://{tmp_path}/part-3.tar", [BAD])
    recipe = load_recipe(write_recipe(stage1__data={"file": pattern}, stage1__optimisation__max_steps=9))
    with pytest.raises(DataError, match=r"sample 9999 of memory://.*/part-3.tar is not JSON"):
        train(recipe, [1], resume=False, console=QUIET)


def test_first_records_are_checked_before_the_first_step(write_recipe, put_shards, tmp_path):
    pattern = put_shards(f"memory://{tmp_path}")
    write_tar(f"memory://{tmp_path}/part-0.tar", [BAD])
    for rule in ("stop", "skip"):  # nothing but bad ones
        recipe = load_recipe(write_recipe(stage1__data={"file": pattern}, on_bad_record=rule))
        with pytest.raises(DataError, match=r"sample 9999 of memory://.*/part-0.tar is not JSON"):
            train(recipe, [1], resume=False, console=QUIET)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_stops_a_run_that_skips_bad_records(write_recipe, put_shards, tmp_path, workers):
    pattern = put_shards(tmp_path)
    shard = tmp_path / "part-3.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    settings = {"on_bad_record": "skip", "dataloader_workers": workers, "stage1__optimisation__max_steps": 20}
    with pytest.raises(ShardError, match=r"^shard .*/part-3.tar cannot be read .*unexpected end of data$"):
        train(load_recipe(write_recipe(stage1__data={"file": pattern}, **settings)), [1], resume=False, console=QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lanes", "is of 1 processes with 1 workers and 4 records at once, but this run has 1 processes with 2 workers"),
        ("shards", "its data files now hold others"),
    ],
)
def test_a_run_resumes_on_its_stream_alone(write_recipe, put_shards, tmp_path, stopping, change, message):
    settings = {"stage1__data": {"file": put_shards(f"memory://{tmp_path}")}}
    with stopping(3):
        train(load_recipe(write_recipe(**settings)), [1], resume=False, console=QUIET)
    if change == "shards":
        write_tar(f"memory://{tmp_path}/part-6.tar", [])
    with pytest.raises(DataError, match=message):
        train(load_recipe(write_recipe(**settings, dataloader_workers=2 if change == "lanes" else 0)), [1], resume=True, console=QUIET)


def test_a_live_teacher_takes_a_stream(write_recipe, put_shards, put_stage, tiny_base, tmp_path):
    put_stage(2)
    changes = {"stage3__data": {"file": put_shards(tmp_path)}, "stage3__distillation": {"teacher": str(tiny_base / "base")}}
    (stage,) = train(load_recipe(write_recipe(**changes)), [3], resume=False, console=QUIET)
    losses = [line["distillation_loss"] for line in read_lines(stage / "log.jsonl") if "loss" in line]
    assert losses[0] == pytest.approx(0, abs=1e-5)  # experts begin as copies of the teacher's FFNs
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stage1__optimisation__max_steps": -1},
            r"stage1.optimisation.max_steps is needed, as the length of the stream x/\*.tar is unknown",
        ),
        ({"stage1__optimisation__group_by_length": True}, r"stage1.optimisation.group_by_length is set, but data names a stream"),
        ({"stage1__data": {"file": "x/*.tar", "images": "x"}}, r"stage1.data.images is set, but data names a stream"),
        ({"stage1__data": {"file": "x/*.tar", "weight": 2.0}}, r"stage1.data.weight is set, but data names a stream"),
        ({"stage1__data": [{"file": "x/*.tar"}, {"file": "y.json", "images": "y"}]}, "must be a stage's only data"),
        ({"feature_cache": "x"}, r"stage1.data names a stream, x/\*.tar, .*but feature_cache is set"),
        ({"stage3__data": {"file": "x/*.tar"}, "stage3__distillation": {"teacher": "x", "top_k": 2}}, r"stage3.distillation.top_k is set"),
        ({"stage1__data": {"file": "x.json"}}, "stage1.data.images is missing"),
        ({"stage1__data": {"file": "x.json", "images": "x", "shuffle_buffer": 2}}, "only shards are shuffled in a buffer"),
    ],
)
def test_what_a_stream_cannot_do(write_recipe, settings, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(**({"stage1__data": {"file": "x/*.tar"}} | settings)))


def test_shards_that_do_not_exist_are_found_before_the_first_step(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(stage1__data={"file": str(tmp_path / "*.tar")}))
    with pytest.raises(DataError, match=r"shards .*\*.tar do not exist"):
        train(recipe, [1], resume=False, console=QUIET)
    assert not Path(recipe.output).exists()
