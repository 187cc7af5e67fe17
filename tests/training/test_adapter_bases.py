"""An adapter belongs to one base, by the content of its weights; and its own tensors are all there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint, load_model, load_processor
from moe_llava.common.errors import CheckpointError
from moe_llava.training import adapters
from moe_llava.training.recipe import Adapter
from moe_llava.training.run import train
from tests.conftest import refused
from tests.training.test_adapters import adapted, step, with_adapter
from tests.training.test_run import QUIET


@pytest.fixture(scope="module")
def adapter_and_base(tiny_base, tmp_path_factory):
    """(folder of an adapter of attention and routers, its base: sparse in layers 0 and 2). The adapter's own fields are not zero."""
    home = tmp_path_factory.mktemp("adapter")
    dense, processor = load_checkpoint(tiny_base / "base")
    for part in (upcycle(dense), processor):
        part.save_pretrained(home / "base")
    model, _ = adapted(load_model(home / "base"), "attention", "experts")
    step(model, text_inputs())
    adapters.write_adapter(model, home / "adapter", str(home / "base"), str(home / "base"))
    return home / "adapter", home / "base"


def text_inputs():
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def other_base(base, folder, change=lambda model: None, **settings):
    """A copy of `base`, in two files, with other weights or settings."""
    model = load_model(base, **settings)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder, max_shard_size="200KB")
    load_processor(base).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        (lambda model: model.lm_head.weight[3].add_(1), {}, "it was trained on other weights"),
        (lambda model: model.model.vision_tower.get_parameter("embeddings.class_embedding").mul_(2), {}, "it was trained on other weights"),
        (lambda model: None, {"num_experts_per_tok": 1}, "whose MoE settings are {'num_experts': 4, 'num_experts_per_tok': 1"),
        (lambda model: None, {"norm_topk_prob": False}, "'norm_topk_prob': False"),
        (lambda model: None, {"capacity_factor": 1.5}, "'capacity_factor': 1.5"),
    ],
)
def test_a_base_with_other_weights_or_settings(adapter_and_base, tmp_path, change, settings, told):
    adapter, base = adapter_and_base
    other = other_base(base, tmp_path / "other", change, **settings)
    problem = refused("merge", adapter, tmp_path / "out", "--base", other)
    assert problem.startswith(f"adapter {adapter} does not fit {other}")
    assert told in problem
    assert not (tmp_path / "out").exists()


def test_a_base_with_other_sparse_layers(adapter_and_base, tiny_base, tmp_path):
    adapter, _ = adapter_and_base
    dense, processor = load_checkpoint(tiny_base / "base")
    for part in (upcycle(dense, moe_layers=[1, 3]), processor):
        part.save_pretrained(tmp_path / "other")
    assert "'moe_layer_indices': [1, 3]" in refused("merge", adapter, tmp_path / "out", "--base", tmp_path / "other")
    assert "whose MoE settings are {}, but were {'num_experts': 4" in refused(
        "merge", adapter, tmp_path / "out", "--base", tiny_base / "base"
    )
    (copied := tmp_path / "silent").mkdir()
    for file in adapter.iterdir():
        if file.name != adapters.BASE:
            shutil.copy(file, copied)
    problem = refused("merge", copied, tmp_path / "out", "--base", tmp_path / "other")
    assert "does not fit" in problem


def test_the_same_base_in_other_files(adapter_and_base, tmp_path, caplog):
    """Its weights are known by what they are, not by the files they lie in. An adapter that does not say what it belongs to is merged,
    with a warning."""
    adapter, base = adapter_and_base
    expected = adapters.merge(adapter)[0].state_dict()
    moved = other_base(base, tmp_path / "moved")
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1
    for folder in (adapter, shutil.copytree(adapter, tmp_path / "silent", ignore=shutil.ignore_patterns(adapters.BASE))):
        merged = adapters.merge(folder, moved)[0].state_dict()
        assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert [record.message for record in caplog.records if "adapter" in record.message] == [
        f"adapter {tmp_path / 'silent'} does not say which weights it was trained on: only names and shapes are compared with {moved}"
    ]


def test_tensors_of_an_adapter_that_do_not_fit(adapter_and_base, tmp_path):
    adapter, _ = adapter_and_base
    folder = tmp_path / "damaged"
    shutil.copytree(adapter, folder)
    file, whole = folder / "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in whole if "layers.1.self_attn.q_proj.lora_B" in name)
    for tensors, told in (
        ({key: whole[key] for key in whole if key != name}, f"missing: {name} [32, 2]"),
        (whole | {"base_model.model.more": torch.zeros(2)}, "unexpected: base_model.model.more [2]"),
        (whole | {name: torch.zeros(32, 3)}, f"misshapen: {name} is [32, 3], but on this base must be [32, 2]"),
    ):
        save_file(tensors, file)
        problem = refused("merge", folder, tmp_path / "out")
        assert problem.startswith(f"adapter {folder} does not fit its base")
        assert told in problem
    for content, told in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "holds Git LFS pointers instead of files: adapter_model.safetensors",
        ),
        (file.read_bytes()[:-100], "adapter_model.safetensors is truncated"),
    ):
        file.write_bytes(content)
        assert told in refused("merge", folder, tmp_path / "out")
    file.unlink()
    assert f"adapter {folder} has no weights" in refused("merge", folder, tmp_path / "out")


def test_going_on_from_an_adapter_whose_base_changed(write_recipe, adapter_and_base, tmp_path):
    """Before the stage begins."""
    adapter, base = adapter_and_base
    other = other_base(base, tmp_path / "other", lambda model: model.lm_head.weight[3].add_(1))
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": other}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    recipe = with_adapter(write_recipe)
    recipe.stage3.adapter = Adapter(["attention", "experts"], rank=2, alpha=4, continue_from=str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match="it was trained on other weights"):
        train(recipe, [3], resume=False, console=QUIET)
    assert not (tmp_path / "run").exists()
