"""One run per stage: a second one is refused at once, and nothing outlives the first."""

import os
import signal
import time

import pytest
from rich.console import Console

from moe_llava.training.process import lock_stages
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.saves import Stopped
from tests.conftest import refused
from tests.training.test_saves import command, wait_for


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_run_is_refused_until_the_first_ends_however_it_does(write_recipe, tmp_path, processes):
    """The first has workers that load data, which live a few seconds longer when it is killed; torchrun's processes end with it."""
    settings = {"max_steps": 5000, "per_device_batch_size": 4 // processes}
    file = write_recipe(save_steps=2, dataloader_workers=1, **{f"stage1__optimisation__{key}": value for key, value in settings.items()})
    output = tmp_path / "run"
    first = command(processes, "train", file, "--stage", "1")
    wait_for(3, output / ".stage1", first)
    for options in ([], ["--resume", "--stage", "2"]):
        if processes == 1:
            errors = refused("train", file, "--stage", "1", *options)
            assert errors.startswith(f"another run (process {first.pid} on ")
            assert "Traceback" not in errors
        else:
            second = command(processes, "train", file, "--stage", "1", *options)
            _, errors = second.communicate(timeout=120)
            assert second.returncode == 1
            assert "error: another run (process " in errors
        assert f" is at {output / 'stage1'}: wait until it ends" in errors
    assert first.poll() is None
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    if processes > 1:
        time.sleep(1)  # the kernel tells torchrun's processes when it has ended
    with lock_stages(output, ["stage1"]):
        pass
    if processes == 1:
        with pytest.raises(Stopped):
            train(load_recipe(file), [1], resume=True, console=StopAtOnce())


class StopAtOnce(Console):
    """Asks the run to stop at its first logged step."""

    def __init__(self):
        super().__init__(file=open(os.devnull, "w"))  # noqa: SIM115

    def print(self, *things, **settings):
        if "/5000 loss" in str(things):
            os.kill(os.getpid(), signal.SIGTERM)


def test_locks_leave_nothing_behind(tmp_path):
    output = tmp_path / "a" / "b"
    with lock_stages(output, ["stage1", "stage2"]):
        assert sorted(path.name for path in output.iterdir()) == [".stage1.lock", ".stage2.lock"]
        with (
            pytest.raises(RecipeError, match=rf"another run \(process {os.getpid()} on .+\) is at {output}/stage2"),
            lock_stages(output, ["stage2"]),
        ):
            pass
        with lock_stages(output, ["dense"]):
            pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RecipeError, match=r"output is .*file/run, but .*file.* is no folder"),
        lock_stages(tmp_path / "file" / "run", ["stage1"]),
    ):
        pass
