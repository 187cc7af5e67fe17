"""Damaged saves and stages are found by their checksums, named, and never resumed from."""

import json
import re
import shutil

import pytest
from rich.console import Console

from moe_llava.common.errors import DataError
from moe_llava.training.checks import check_resume, check_stages
from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from moe_llava.training.saves import MANIFEST
from moe_llava.training.stage import Stage
from tests.conftest import refused

QUIET = Console(quiet=True)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE = {
    "a bit of the first byte": lambda file: flip(file, 0),
    "a bit in the middle": lambda file: flip(file, 0.5),
    "a bit of the last byte": lambda file: flip(file, 1),
    "cut off": truncate,
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


@pytest.fixture
def stopped(write_recipe, tmp_path, stopping):
    """(recipe file, folder of stage I with saves of steps 2, 4 and 6, its records)"""
    file = write_recipe(save_total_limit=3, stage1__optimisation__max_steps=8)
    with stopping(7):
        train(load_recipe(file), [1], resume=False, console=QUIET)
    (records,) = check_stages([Stage(load_recipe(file), 1)]).values()
    return file, tmp_path / "run" / ".stage1", records


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_save_is_named_and_the_last_whole_one_offered(stopped, damage):
    """Each of its files in turn."""
    _, work, records = stopped
    check_resume(work, records)
    whole, save = work.with_name("whole"), work / "checkpoint-6"
    shutil.copytree(save, whole)
    names = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]
    assert {MANIFEST, "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        DAMAGE[damage](save / name)
        with pytest.raises(DataError) as caught:
            check_resume(work, records)
        if name != MANIFEST:
            assert re.match(rf"{save / name} is (damaged: .+|missing)\n", str(caught.value)), caught.value
        assert str(save) in str(caught.value)
        assert str(caught.value).endswith(f"{work / 'checkpoint-4'} is whole: remove {save} to resume from it")
        shutil.rmtree(save)
        shutil.copytree(whole, save)
    check_resume(work, records)


def test_resuming_as_the_message_says(stopped):
    """The last two of three saves are damaged: nothing is touched, and without them the run ends."""
    file, work, records = stopped
    for step in (4, 6):
        flip(work / f"checkpoint-{step}" / "optimizer.pt", 0.7)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    told = refused("train", file, "--stage", "1", "--resume")
    saves = [work / f"checkpoint-{step}" for step in (2, 4, 6)]
    assert f"{saves[2] / 'optimizer.pt'} is damaged: its SHA-256 is not that of what was written" in told
    assert f"{saves[0]} is whole: remove {saves[1]} and {saves[2]} to resume from it" in told
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    flip(saves[0] / "model.safetensors", 0.7)
    with pytest.raises(DataError, match=f"no other save is whole: remove {work} to begin the stage again"):
        check_resume(work, records)
    flip(saves[0] / "model.safetensors", 0.7)
    for save in saves[1:]:
        shutil.rmtree(save)
    train(load_recipe(file), [1], resume=True, console=QUIET)


def test_a_save_without_checksums_is_damaged(stopped):
    _, work, records = stopped
    (work / "checkpoint-6" / MANIFEST).unlink()
    with pytest.raises(DataError, match=rf"checkpoint-6/{MANIFEST} cannot be read .*\n.*checkpoint-4 is whole"):
        check_resume(work, records)


@pytest.mark.parametrize(("name", "place"), [("records.json", 0), ("log.jsonl", 0), ("log.jsonl", 0.5)])
def test_other_files_of_a_stage_that_was_begun(stopped, name, place):
    file, work, _ = stopped
    content = bytearray((work / name).read_bytes())
    content[int(place * len(content))] = 0
    (work / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{work / name}(, line \d+)? is damaged: it is not JSON"):
        train(load_recipe(file), [1], resume=True, console=QUIET)


def test_a_stage_does_not_start_from_a_damaged_one(write_recipe, tmp_path):
    file = write_recipe()
    (one,) = train(load_recipe(file), [1], resume=False, console=QUIET)
    assert list(json.loads((one / MANIFEST).read_text())) == ["model.safetensors"]
    flip(one / "model.safetensors", 0.9)
    told = refused("train", file, "--stage", "2")
    assert f"{one / 'model.safetensors'} is damaged: its SHA-256 is not that of what was written" in told
    assert not (tmp_path / "run" / ".stage2").exists()
    flip(one / "model.safetensors", 0.9)
    train(load_recipe(file), [2], resume=False, console=QUIET)


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_weights_beside_a_save(write_recipe, put_stage, tmp_path, stopping, part):
    """The frozen base of an adapter is in no save; and a finished adapter may be gone on from."""
    adapter = {"targets": ["attention", "experts"], "rank": 2}
    file = write_recipe(stage3__adapter=adapter)
    put_stage(2)
    work, final = tmp_path / "run" / ".stage3", tmp_path / "run" / "stage3"
    if part == "base":
        with stopping(3):
            train(load_recipe(file), [3], resume=False, console=QUIET)
        weights, options = work / "base" / "model.safetensors", ["--resume"]
    else:
        train(load_recipe(file), [3], resume=False, console=QUIET)
        weights = final / "adapter" / "adapter_model.safetensors"
        options = ["--set", f"stage3.adapter.continue_from={final / 'adapter'}", "--set", f"output={tmp_path / 'again'}"]
    flip(weights, 0.9)
    assert f"{weights} is damaged: its SHA-256" in refused("train", file, "--stage", "3", *options)
    flip(weights, 0.9)
    train(load_recipe(file, options[1::2] if part == "adapter" else []), [3], resume=part == "base", console=QUIET)
