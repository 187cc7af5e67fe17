"""Published checkpoints that are refused, and what is said about them."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig

from moe_llava import load_published
from moe_llava.common.errors import CheckpointError
from tests.checkpoints import tiny_published as tiny
from tests.checkpoints.test_published import change, shard, single_bin, towers, write  # noqa: F401


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": None}, "has model_type 'moe_llava_qwen1_5', but no settings `moe`"),
        ({"model_type": "moe_llava_gpt"}, "has model_type 'moe_llava_gpt', but a published checkpoint has one of"),
        ({"model_type": "llama"}, "has model_type 'llama'"),
        ({"model_type": None}, "has model_type None"),
        ({"mm_image_tower": "openai/none"}, "the vision tower openai/none is in none of"),
        ({"mm_image_tower": None}, "must name the vision tower"),
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
        ({"image_projector_type": "qformer2_64"}, "has image_projector_type 'qformer2_64'"),
        ({"mm_vision_select_feature": "cls"}, "has mm_vision_select_feature 'cls'"),
        ({"moe": {"num_experts": [3, 2], "top_k_experts": 2, "moe_layers_idx": [1, 2]}}, r"has moe.num_experts \[3, 2\]"),
        ({"moe": {"num_experts": [3], "top_k_experts": 2, "moe_layers_idx": []}}, "lacks moe.moe_layers_idx"),
        ({"moe": {"num_experts": [3], "top_k_experts": 4, "moe_layers_idx": [1]}}, "num_experts_per_tok is 4"),
        ({"moe": {"num_experts": [3], "top_k_experts": "2", "moe_layers_idx": [1]}}, "which must be integers"),
        ({"num_attention_heads": "four"}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "defines no model"),
        ({"hidden_act": "none"}, "defines no model"),
        ({"pad_token_id": 500}, "defines no model"),
        ({"mm_vision_select_layer": -9}, "has mm_vision_select_layer -9, but its tower has 3 layers"),
        ({"image_aspect_ratio": "anyres"}, "has image_aspect_ratio 'anyres'"),
    ],
)
def test_configurations_that_are_refused(write, towers, changes, message):  # noqa: F811
    folder, *_ = write()
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_published(folder, towers)
    assert str(folder) in str(caught.value) or "tower" in message


def test_a_qwen_with_biases_is_refused(write, towers):  # noqa: F811
    folder, *_ = write("qwen")
    change(folder, no_bias=False)
    with pytest.raises(CheckpointError, match="has no_bias False, but only True"):
        load_published(folder, towers)


def test_all_wrong_names_and_shapes_are_listed(write, towers):  # noqa: F811
    folder, _, weights = write()
    del weights["model.norm.weight"], weights["model.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.2.up_proj.weight"]
    weights["model.extra.weight"] = torch.ones(2)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_published(folder, towers)
    text = str(caught.value)
    assert "missing: model.norm.weight [32]" in text
    assert "missing: model.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.2.up_proj.weight [48, 32]" in text
    assert "unexpected: model.extra.weight [2]" in text
    assert "misshapen: lm_head.weight is [119, 32], but the configuration asks for [120, 32]" in text


def test_a_truncated_safetensors_file(write, towers):  # noqa: F811
    folder, *_ = write()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for length in (len(content) - 10, 100, 5, 0):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors is truncated, or no safetensors file: \S"):
            load_published(folder, towers)
    for header in (b"no header at all", b'["no mapping"]', b'{"a": "no entry"}', b'{"a": {"shape": [1]}}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header + content)
        with pytest.raises(CheckpointError, match=r"model.safetensors is truncated, or no safetensors file: \S"):
            load_published(folder, towers)


def test_a_truncated_or_missing_shard(write, towers):  # noqa: F811
    folder, _, weights = write()
    shard(weights, folder, "bin")
    file = folder / "pytorch_model-00002-of-00003.bin"
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003.bin is truncated or damaged"):
        load_published(folder, towers)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003.bin"):
        load_published(folder, towers)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"names shards that .* does not have: pytorch_model-00002-of-00003.bin"):
        load_published(folder, towers)


@pytest.mark.parametrize("content", [{"weight_map": None}, {"weight_map": {"a": 1}}, {}])
def test_an_invalid_index(write, towers, content):  # noqa: F811
    folder, *_ = write()
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must hold a `weight_map` from tensors to files"):
        load_published(folder, towers)


class Harmful:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('harm').touch()",))


@pytest.mark.parametrize("content", [{"a": torch.ones(2).to_sparse()}, {1: torch.ones(2)}, [torch.ones(2)]])
def test_a_pickle_of_something_else(write, towers, content):  # noqa: F811
    folder, *_ = write()
    single_bin(content, folder)
    with pytest.raises(CheckpointError, match="must hold dense tensors by name"):
        load_published(folder, towers)


def test_integer_weights_are_refused(write, towers):  # noqa: F811
    folder, _, weights = write()
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not floating point: lm_head.weight is torch.int32"):
        load_published(folder, towers)


def test_a_pickle_with_code_is_not_run(write, towers, tmp_path, monkeypatch):  # noqa: F811
    folder, *_ = write()
    (folder / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    torch.save({"lm_head.weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin holds more than tensors, which may be code"):
        load_published(folder, towers)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        load_published(folder, towers)
    assert not (tmp_path / "harm").exists()


def test_a_folder_without_weights_or_configuration(write, towers, tmp_path):  # noqa: F811
    folder, *_ = write()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights; looked for"):
        load_published(folder, towers)
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        load_published(tmp_path, towers)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_published(tmp_path / "none" / "at" / "all", towers)
    with pytest.raises(CheckpointError, match="is no folder, and the hub did not provide it"):
        load_published("nobody/nothing", towers)


def test_another_kind_of_tower_is_refused(write, tmp_path):  # noqa: F811
    folder, *_ = write()
    ViTConfig().save_pretrained(tmp_path / "towers" / tiny.CLIP)
    with pytest.raises(CheckpointError, match="has model_type 'vit', but must have one of clip_vision_model, siglip_vision_model"):
        load_published(folder, tmp_path / "towers")


def test_a_tower_that_is_not_cached(write):  # noqa: F811
    folder, *_ = write()
    with pytest.raises(CheckpointError, match="the vision tower openai/clip-tiny cannot be loaded from openai/clip-tiny"):
        load_published(folder)


def test_a_tower_without_all_its_weights(write, towers, tmp_path):  # noqa: F811
    folder, *_ = write(with_tower=False)
    copy = tiny.write_towers(tmp_path / "copy")
    weights = load_file(copy / tiny.CLIP / "model.safetensors")
    save_file({name: weights[name] for name in list(weights)[3:]}, copy / tiny.CLIP / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not hold the weights .*\n  missing: embeddings.class_embedding \[16\]"):
        load_published(folder, copy)
    weights = {name: tensor[:1].clone() for name, tensor in weights.items()}
    save_file(weights, copy / tiny.CLIP / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"misshapen: .*class_embedding is \[1\], but the configuration asks for \[16\]"):
        load_published(folder, copy)
    (copy / tiny.CLIP / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"clip-tiny has no weights; looked for"):
        load_published(folder, copy)
