"""Missing, unexpected or misshapen weights are listed in every way to load a checkpoint; harmless differences are accepted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from moe_llava.checkpoints.load import check_weights, load_checkpoint, load_config, load_model
from moe_llava.checkpoints.offload import load_offloaded
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import MOST_LISTED
from moe_llava.model import upcycle
from moe_llava.training.adapters import quantisation_config
from tests.conftest import refused
from tests.training.conftest import tiny_base, wide_base, write_recipe  # noqa: F401

PROJECTOR, HEAD = "multi_modal_projector.linear_1.weight", "lm_head.weight"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture(scope="module")
def sparse(tiny_base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("strict") / "sparse"
    dense, processor = load_checkpoint(tiny_base / "base")
    for part in (upcycle(dense, num_experts=4), processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(sparse, tiny_base, tmp_path):  # noqa: F811
    """Copy a checkpoint, let `change` modify its tensors by their stored names, and store them in the layout `how`."""

    def make(change, kind="sparse", how="single", config=None):
        folder = tmp_path / "damaged"
        shutil.copytree({"sparse": sparse, "dense": tiny_base / "base"}[kind], folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()
        if how == "single":
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        elif how == "pickle":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            names = sorted(tensors)
            shards = {"a.safetensors": names[:30], "b.safetensors": names[30:]}
            for file, held in shards.items():
                save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
            places = {name: file for file, held in shards.items() for name in held}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        if config:
            content = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(content | config))
        return folder

    return make


def stored(tensors, end):
    """Return the only stored name with this ending; within the language model, if other parts have it too."""
    found = [name for name in tensors if name.endswith(end) and ("layers" not in end or "language_model" in name)]
    assert len(found) == 1, found
    return found[0]


def without(*ends):
    return lambda tensors: [tensors.pop(stored(tensors, end)) for end in ends]


def shaped(end, *shape):
    return lambda tensors: tensors.update({stored(tensors, end): torch.zeros(shape)})


@pytest.mark.parametrize("how", ["single", "shards", "pickle"])
@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("sparse", without("layers.2.mlp.experts.down_proj"), "missing: model.language_model.layers.2.mlp.experts.down_proj [4, 32, 48]"),
        ("sparse", without("layers.0.mlp.router.weight"), "missing: model.language_model.layers.0.mlp.router.weight [4, 32]"),
        ("dense", without("layers.1.mlp.up_proj.weight"), "missing: model.language_model.layers.1.mlp.up_proj.weight [48, 32]"),
        ("dense", without(HEAD), "missing: lm_head.weight ["),
        ("dense", without(PROJECTOR), f"missing: model.{PROJECTOR} [32, 16]"),
        ("dense", without("class_embedding"), "embeddings.class_embedding [16]"),
        ("dense", lambda tensors: tensors.update({"lm_head.bias": torch.zeros(3)}), "unexpected: lm_head.bias [3]"),
        ("sparse", shaped(PROJECTOR, 512, 1), f"misshapen: model.{PROJECTOR} is [512, 1], but the configuration asks for [32, 16]"),
        ("dense", shaped("layers.3.self_attn.k_proj.weight", 32, 32), "k_proj.weight is [32, 32], but the configuration asks for [16, 32]"),
    ],
)
def test_missing_unexpected_and_misshapen_weights(damaged, kind, change, told, how):
    folder = damaged(change, kind, how)
    for load in (load_model, check_weights):
        with pytest.raises(CheckpointError) as error:
            load(folder)
        assert str(error.value).startswith(f"checkpoint {folder} does not hold the weights that its config.json describes:\n")
        assert told in str(error.value)


def test_a_configuration_that_does_not_fit(damaged):
    """All problems are listed; a long list is cut, and counted."""
    folder = damaged(lambda tensors: None, config={"num_experts": 8})
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(error.value).count("misshapen: ") == 6
    assert "layers.2.mlp.experts.gate_up_proj is [4, 96, 32], but the configuration asks for [8, 96, 32]" in str(error.value)


def test_a_long_list_is_counted(damaged):
    folder = damaged(lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    number = sum("vision_tower" in name for name in load_file(folder / "model.safetensors")) + str(error.value).count("missing: ")
    assert number == MOST_LISTED
    assert str(error.value).splitlines()[-1].endswith(" more")


def test_settings_that_do_not_fit_the_weights(sparse):
    assert load_model(sparse, num_experts_per_tok=1).config.num_experts_per_tok == 1
    with pytest.raises(CheckpointError, match=r"router.weight is \[4, 32\], but the configuration asks for \[8, 32\]"):
        load_model(sparse, num_experts=8)
    with pytest.raises(CheckpointError, match=r"missing: model.language_model.layers.1.mlp.experts.down_proj \[4, 32, 48\]\n"):
        load_model(sparse, moe_layers="all")


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
        "vision_tower.vision_model.head.probe",
    ],
)
def test_unused_buffers_are_accepted(damaged, tiny_base, name):  # noqa: F811
    folder = damaged(lambda tensors: tensors.update({name: torch.zeros(4)}), "dense")
    expected = load_model(tiny_base / "base").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_model(folder).state_dict().items())


@pytest.mark.parametrize("how", ["single", "pickle"])
def test_a_tied_head(damaged, how):
    """It may be missing or stored twice, but a different head would be lost in a model that is made from this one."""

    def stored_twice(tensors):
        tensors[HEAD if HEAD in tensors else stored(tensors, HEAD)] = tensors[stored(tensors, "embed_tokens.weight")].clone()

    tie = {"tie_word_embeddings": True}
    for change in (without(HEAD), stored_twice):
        folder = damaged(change, "dense", how, tie)
        model = load_model(folder)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        shutil.rmtree(folder)
    folder = damaged(lambda tensors: None, "dense", how, tie)
    with pytest.raises(CheckpointError, match="tie_word_embeddings true, but the head that is stored differs"):
        load_model(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"missing: .*embed_tokens.weight"):
        load_model(damaged(without(HEAD, "embed_tokens.weight"), "dense", how, tie))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_while_loading(damaged, sparse, kind):
    """bitsandbytes compares no shapes."""
    settings = {"quantization_config": quantisation_config(sparse, kind, torch.float32), "device_map": "cpu"}
    with pytest.raises(CheckpointError, match=r"q_proj.weight is \[16, 32\], but the configuration asks for \[32, 32\]"):
        load_model(damaged(shaped("layers.1.self_attn.q_proj.weight", 16, 32)), **settings)


@pytest.mark.parametrize(("kind", "scale"), [("nf4", "weight.absmax"), ("int8", "SCB")])
@pytest.mark.parametrize("separate", [False, True], ids=["stacked", "separate"])
def test_stored_quantised(wide_base, tmp_path, kind, scale, separate):  # noqa: F811
    upcycle(load_model(wide_base), num_experts=4).save_pretrained(tmp_path / "plain")
    settings = {"quantization_config": quantisation_config(tmp_path / "plain", kind, torch.float32), "device_map": "cpu"}
    load_model(tmp_path / "plain", separate_experts=separate, **settings).save_pretrained(tmp_path / "packed")
    assert load_model(tmp_path / "packed").config.quantization_config
    file = tmp_path / "packed" / "model.safetensors"
    whole = load_file(file)
    expert = [f"layers.0.mlp.experts.down_proj.3.{part}" for part in ("weight", scale)] if separate else ["layers.0.mlp.experts.down_proj"]
    for end in (f"layers.1.self_attn.q_proj.{scale}", "layers.1.self_attn.q_proj.weight", *expert):
        save_file({name: tensor for name, tensor in whole.items() if name != stored(whole, end)}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"missing: \S+{end}"):
            load_model(tmp_path / "packed")
    assert "are quantised, but must be plain here" in refused("upcycle", tmp_path / "packed", tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("num_experts", None, "num_experts is None, but must be a whole number"),
        (
            "text_config",
            {"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": ["full_attention"]},
            "`num_hidden_layers` (2) must be equal",
        ),
        ("text_config", {"model_type": "qwen2", "num_hidden_layers": "2"}, "Field 'num_hidden_layers' expected int, got str"),
    ],
)
def test_a_bad_value_in_the_configuration(sparse, tmp_path, field, value, reason):
    config = json.loads((sparse / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"checkpoint {tmp_path} cannot be loaded: {reason}")
    assert str(error.value).endswith(" (in its config.json)")


@pytest.mark.parametrize("name", ["model.safetensors", "a.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
def test_git_lfs_pointers_are_named(damaged, name):
    how = {"a.safetensors": "shards", "pytorch_model.bin": "pickle"}.get(name, "single")
    folder = damaged(lambda tensors: None, how=how)
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"holds Git LFS pointers instead of files: {name}; .*git lfs pull"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("how", "change", "told"),
    [
        ("single", lambda folder: (folder / "model.safetensors").unlink(), "has no weights; looked for"),
        ("shards", lambda folder: (folder / "b.safetensors").unlink(), "names shards that .* does not have: b.safetensors"),
        ("single", lambda folder: cut(folder / "model.safetensors"), r"model.safetensors is truncated"),
        ("shards", lambda folder: cut(folder / "b.safetensors"), r"b.safetensors is truncated"),
        ("pickle", lambda folder: cut(folder / "pytorch_model.bin"), r"pytorch_model.bin is truncated or damaged"),
    ],
)
def test_files_that_are_missing_or_cut(damaged, how, change, told):
    folder = damaged(lambda tensors: None, how=how)
    change(folder)
    with pytest.raises(CheckpointError, match=rf"checkpoint \S+damaged cannot be loaded: .*{told}"):
        load_model(folder)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def test_experts_on_disk(damaged):
    with pytest.raises(CheckpointError, match=r"missing: .*layers.2.mlp.experts.down_proj \[4, 32, 48\]"):
        load_offloaded(damaged(without("layers.2.mlp.experts.down_proj")), 0.5)


def test_every_verb_that_loads_a_checkpoint(damaged, write_recipe, tiny_base, tmp_path):  # noqa: F811
    """No verb leaves half a result behind."""
    data = tiny_base / "data"
    folder = damaged(without("layers.0.mlp.experts.down_proj"))
    told = "missing: model.language_model.layers.0.mlp.experts.down_proj [4, 32, 48]"
    whole = f"checkpoint {folder} does not hold the weights that its config.json describes:\n  {told}\n"
    assert refused("chat", folder, "hello") == whole
    out = tmp_path / "out"
    for arguments in (
        ("chat", folder, "hello", "--keep-experts", "0.5"),
        ("serve", folder, "--port", "0"),
        ("evaluate", folder, "--benchmark", "digits", "--data", data, "--out", tmp_path / "evaluated"),
        ("routes", folder, "--data", data / "test.json", "--images", data / "images", "--out", out),
        ("bench", "generate", folder),
        ("train", write_recipe(model=str(folder)), "--stage", "3"),
    ):
        assert told in refused(*arguments), arguments
    shutil.rmtree(folder)
    folder = damaged(without("layers.1.mlp.up_proj.weight"), "dense")
    for arguments in (("upcycle", folder, out), ("train", write_recipe(model=str(folder)))):
        assert "missing: model.language_model.layers.1.mlp.up_proj.weight [48, 32]" in refused(*arguments), arguments
    assert not out.exists()
    assert not (tmp_path / "run").exists()


def test_from_pretrained_uses_no_random_weights(damaged):
    folder = damaged(lambda tensors: tensors.pop("model.language_model.layers.0.mlp.router.weight"))
    with pytest.raises(ValueError, match=r"damaged does not hold model.language_model.layers.0.mlp.router.weight"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_integer_weights_are_refused(damaged):
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    folder = damaged(lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"not floating point, and no quantization_config:\n  {name} is stored as int8"):
        load_model(folder)


def test_a_file_takes_precedence_over_an_index_as_in_transformers(damaged, sparse):
    folder = damaged(lambda tensors: tensors.pop(HEAD), how="shards")
    with pytest.raises(CheckpointError, match=f"missing: {HEAD}"):
        load_model(folder)
    shutil.copy(sparse / "model.safetensors", folder)
    assert torch.equal(load_model(folder).lm_head.weight, load_model(sparse).lm_head.weight)


def test_unreadable_generation_settings(damaged):
    folder = damaged(lambda tensors: None)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not JSON"):
        load_model(folder)
