"""Stage III with experts from several models, and which models are refused before the first stage."""

import shutil

import pytest
import torch
from rich.console import Console

from moe_llava.checkpoints import load
from moe_llava.checkpoints.load import load_model
from moe_llava.common.errors import CheckpointError
from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from tests.conftest import refused
from tests.training.test_teachers import other_vocabulary

QUIET = Console(quiet=True)


@pytest.fixture
def origins(tiny_base, tmp_path):
    """Two folders: the tiny base as it is, and with other FFNs, in bfloat16 as published models are."""
    folders = [tmp_path / "same", tmp_path / "other"]
    for factor, folder in enumerate(folders, start=1):
        shutil.copytree(tiny_base / "base", folder)
        model = load_model(folder, torch.bfloat16)
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                layer.mlp.down_proj.weight.mul_(factor)
        model.save_pretrained(folder)
    return list(map(str, folders))


@pytest.fixture
def make_recipe(write_recipe, origins):
    def make(**settings):
        return load_recipe(write_recipe(stage3__moe={"num_experts": 2}, stage3__experts_from=origins, **settings))

    return make


def test_each_model_gives_an_expert(make_recipe, put_stage):
    put_stage(2)
    (stage3,) = train(make_recipe(stage3__optimisation__learning_rate=1e-8), [3], resume=False, console=QUIET)
    for mlp in load_model(stage3).sparse_mlps().values():
        one, two = mlp.experts.down_proj
        torch.testing.assert_close(two, 2 * one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("numbers", [[1, 2, 3], [3]])
def test_other_tokens_are_refused_before_the_first_stage(make_recipe, put_stage, tmp_path, numbers):
    other_vocabulary(tmp_path / "other")
    if numbers == [3]:
        put_stage(2)
    with pytest.raises(CheckpointError, match="other has another vocabulary:\n"):
        train(make_recipe(), numbers, resume=False, console=QUIET)
    assert not [name for name in (".stage1", "stage1", ".stage3") if (tmp_path / "run" / name).exists()]


def test_the_command_refuses_other_tokens_before_it_reads_weights(origins, tiny_base, tmp_path, monkeypatch):
    other_vocabulary(tmp_path / "other")
    monkeypatch.setattr(load, "load_model", lambda path: pytest.fail(f"read {path}"))
    given = [word for name in origins for word in ("--experts-from", name)]
    message = refused("upcycle", tiny_base / "base", tmp_path / "out", "--num-experts", "2", *given)
    assert "other has another vocabulary" in message
