"""Models in parts on two real processes over gloo do what a whole model does in one."""

import dataclasses
import json
import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaProcessor, upcycle
from moe_llava.training.checks import check_folder
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.sharding import check_zero, shared_folder
from moe_llava.training.stage import Stage
from tests.conftest import REPOSITORY, run_command, tiny_dense
from tests.training.test_distributed import BIN, make_recipe, read_log, torchrun  # noqa: F401

QUIET = Console(quiet=True)
SHARDING = {"fsdp_size": 2, "ep_size": 2}


def two_processes(script, *arguments):
    """A script of this folder, run by two processes."""
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", Path(__file__).parent / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """ "name/ep_size" -> differences, of sharded_gradients.py."""
    folder = tmp_path_factory.mktemp("gradients")
    for family in ("llama", "phi"):
        # The balance loss multiplies two means over what a process sees, so it is another one in halves of a batch.
        sparse = upcycle(tiny_dense(family), router_aux_loss_coef=0.0)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in sparse.named_parameters():
            if ".experts." in name:  # unequal experts, so that a wrong one shows
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        sparse.save_pretrained(folder / "checkpoints" / family)
    tiny_dense("llama").save_pretrained(folder / "checkpoints" / "dense")
    done = two_processes("sharded_gradients.py", folder / "checkpoints", folder / "result.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense/1", "llama/1", "llama/2", "phi/1", "phi/2"])
def test_gradients_are_those_of_one_process(gradients, name):
    loss, gradient = gradients[name]
    assert loss < 1e-5
    assert gradient < 1e-5


def with_sharding(file, **changes):
    """The recipe, sharded, in a file of its own."""
    sharded = file.with_name(f"sharded-{file.name}")
    sharded.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"sharding": SHARDING} | changes))
    return sharded


@pytest.mark.parametrize("fails", ["making", "using", None])
def test_a_shared_folder_is_removed_after_an_error_too(tmp_path, fails):
    def make():
        yield tiny_dense("llama")
        if fails == "making":
            raise ValueError("making")

    with pytest.raises(ValueError, match=fails) if fails else nullcontext(), shared_folder(tmp_path / "start", make) as folder:
        assert (Path(folder) / "config.json").is_file()
        if fails == "using":
            raise ValueError("using")
    assert not (tmp_path / "start").exists()


@pytest.mark.slow
def test_three_stages_in_parts(make_recipe, tmp_path):  # noqa: F811
    """FSDP2 in stages I and II, expert parallelism in III, two batches a step; also where a process has images and its neighbour none."""
    # The balance loss is that of the batches computed at once, not of all batches of a step, so it is switched off.
    one = run_command("train", make_recipe("one", 4, checkpointing=True, coefficient=0.0))
    assert one.returncode == 0, one.stderr
    printed = torchrun("train", with_sharding(make_recipe("two", 1, checkpointing=True, coefficient=0.0)))
    assert printed.count("stage3 3/3 loss") == 1
    kinds = {"stage1": LlavaForConditionalGeneration, "stage2": LlavaForConditionalGeneration, "stage3": MoeLlavaForConditionalGeneration}
    for stage, kind in kinds.items():
        before, after = (read_log(tmp_path / name / stage) for name in ("one", "two"))
        # From the third step of stage III on rounding decides where tokens go: see test_distributed.py.
        for expected, found in zip(before[:2], after[:2], strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5), stage
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-5), stage
        one, two = (tmp_path / name / stage for name in ("one", "two"))
        before, after = (load_file(folder / "model.safetensors") for folder in (one, two))
        assert {name: (x.shape, x.dtype) for name, x in before.items()} == {name: (x.shape, x.dtype) for name, x in after.items()}
        if stage != "stage3":
            assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-5, stage
        assert type(AutoModelForImageTextToText.from_pretrained(two)) is kind
        assert (one / "config.json").read_text() == (two / "config.json").read_text()
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert type(AutoProcessor.from_pretrained(two)) is MoeLlavaProcessor
    assert not list((tmp_path / "two").glob(".*"))


@pytest.mark.slow
def test_a_run_in_parts_that_died_ends_like_one_that_did_not(write_recipe, tiny_base, tmp_path):
    """From a sparse model, and back to whole ones. With SMoES, whose statistics every process has as a whole."""
    sparse = tmp_path / "sparse"
    upcycle(AutoModelForImageTextToText.from_pretrained(tiny_base / "base"), routing="smoes").save_pretrained(sparse)
    MoeLlavaProcessor.from_llava(AutoProcessor.from_pretrained(tiny_base / "base")).save_pretrained(sparse)
    changes = {"stage3__optimisation__max_steps": 5, "stage3__optimisation__per_device_batch_size": 2}
    file = write_recipe(model=str(sparse), stage3__moe={"routing": "smoes"}, **changes)
    whole = with_sharding(file, output=str(tmp_path / "whole"))
    torchrun("train", whole, "--stage", "3")
    dies = with_sharding(file, output=str(tmp_path / "dies"))
    assert two_processes("stopped.py", dies).returncode != 0
    assert (tmp_path / "dies" / ".stage3" / "checkpoint-2").is_dir()
    torchrun("train", dies, "--stage", "3", "--resume")
    assert [entry["step"] for entry in read_log(tmp_path / "dies" / "stage3")] == [1, 2, 3, 4, 5]  # the first two were not done again
    expected, found = (load_file(tmp_path / name / "stage3" / "model.safetensors") for name in ("whole", "dies"))
    start = load_file(sparse / "model.safetensors")
    assert any(not torch.equal(start[name], found[name]) for name in start)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_run_in_parts_resumes_with_other_sizes(write_recipe, put_stage, tmp_path):
    """Two processes die; others continue, and one without sharding. The balance loss is that of the batches computed at once: see above."""
    settings = {"max_steps": 4, "batch_size": 4, "per_device_batch_size": 1, "learning_rate": 1e-3}
    file = write_recipe(stage3__moe={"router_aux_loss_coef": 0.0}, stage3__optimisation=settings)
    for name in ("whole", "dies"):
        put_stage(2, tmp_path / name)
    torchrun("train", with_sharding(file, output=str(tmp_path / "whole"), sharding={"fsdp_size": 2}), "--stage", "3")
    expected = load_file(tmp_path / "whole" / "stage3" / "model.safetensors")
    assert two_processes("stopped.py", with_sharding(file, output=str(tmp_path / "dies"), sharding={"fsdp_size": 2})).returncode != 0
    for processes, sharding in ((1, None), (2, {"fsdp_size": 2, "ep_size": 2}), (4, {"fsdp_size": 4, "ep_size": 2})):
        output = tmp_path / f"resumed-{processes}"
        shutil.copytree(tmp_path / "dies", output, symlinks=True)
        (output / ".stage3-start").write_text("where a model to start from would be written")
        resumed = with_sharding(file, output=str(output), sharding=sharding)
        assert "stage3 resumes after step 2" in torchrun("train", resumed, "--stage", "3", "--resume", processes=processes)
        found = load_file(output / "stage3" / "model.safetensors")
        assert max((expected[name] - found[name]).abs().max().item() for name in expected) < 1e-6, sharding


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ({"fsdp_size": 1}, r"sharding.fsdp_size is 1, but must be at least 2"),
        ({"fsdp_size": 4, "ep_size": 3}, r"sharding.ep_size is 3, but must divide fsdp_size=4"),
        ({"fsdp_size": 6, "ep_size": 3}, r"sharding.ep_size is 3, but must divide the 4 experts of a layer"),
        ({"fsdp_sise": 2}, r"unknown key sharding.fsdp_sise; did you mean sharding.fsdp_size\?"),
    ],
)
def test_sizes_that_do_not_go_together(write_recipe, sharding, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(sharding=sharding))


def test_sharding_needs_its_processes(write_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"sharding.fsdp_size is 2, but must be the number of processes that torchrun starts, 1"):
        train(load_recipe(write_recipe(sharding=SHARDING)), [1], resume=False, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_deepspeed_that_is_missing_or_too_much(write_recipe, monkeypatch):
    recipe = load_recipe(write_recipe())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match="DeepSpeed, which is not installed: pip install deepspeed"):
        train(recipe, [1], resume=False, console=QUIET)
    monkeypatch.setattr("moe_llava.training.sharding.is_deepspeed_available", lambda: True)
    with pytest.raises(RecipeError, match="does the same: leave one of them out"):
        train(dataclasses.replace(recipe, sharding=load_recipe(write_recipe(sharding=SHARDING)).sharding), [1], resume=False, console=QUIET)
    with pytest.raises(RecipeError, match="zero_stage is 3, but must be 1 or 2"):
        check_zero(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))


def test_a_save_of_a_whole_model_is_not_resumed_in_parts(write_recipe, tmp_path):
    stage = Stage(load_recipe(write_recipe(sharding=SHARDING)), 1)
    save = tmp_path / "run" / ".stage1" / "checkpoint-2"
    (save / "optimizer_shards").mkdir(parents=True)
    check_folder(stage, resume=True)
    (save / "optimizer_shards").rmdir()
    with pytest.raises(RecipeError, match=r"checkpoint-2 holds the optimizer as a whole, which sharding cannot resume: leave sharding out"):
        check_folder(stage, resume=True)
