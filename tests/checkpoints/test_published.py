"""Published checkpoints of the families without recorded outputs, against the arithmetic written down in tiny_published.py, and the files
that they may come in."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, SiglipVisionModel

from moe_llava import MoeLlavaForConditionalGeneration, load_published
from moe_llava.common.errors import CheckpointError
from tests.checkpoints import tiny_published as tiny


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tiny.write_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture
def write(tmp_path, towers):
    """Write a checkpoint and return (folder, settings, weights)."""

    def write(family="qwen1_5", with_tower=True, **options):
        settings = tiny.settings_of(family, **options)
        weights = tiny.weights_of(settings, towers if with_tower else None)
        return tiny.write_published(tmp_path / "published", settings, weights), settings, weights

    return write


def features(model, pixels):
    outputs = model.model.get_image_features(
        pixel_values=pixels, vision_feature_layer=-2, vision_feature_select_strategy=model.config.vision_feature_select_strategy
    )
    return torch.stack(list(outputs.pooler_output))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 1}, {"use_residual": True}, {"top_k": 1, "use_residual": True}, {"sparse": False}],
    ids=["top2", "top1", "residual", "top1_residual", "dense"],
)
@torch.no_grad()
def test_every_family_equals_the_reference(write, towers, family, options):
    folder, settings, weights = write(family, **options)
    model = load_published(folder, towers)
    assert type(model) is (MoeLlavaForConditionalGeneration if options.get("sparse", True) else LlavaForConditionalGeneration)
    assert not model.training
    x = torch.randn(10, tiny.D, generator=torch.Generator().manual_seed(1))
    logits = model.lm_head(model.model.language_model(inputs_embeds=x[None]).last_hidden_state)[0]
    torch.testing.assert_close(logits, tiny.compute(settings, weights, x), atol=1e-4, rtol=0)
    embedding = weights["transformer.wte.weight" if family == "qwen" else "model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize(("tower", "tower_class", "count"), [(tiny.CLIP, CLIPVisionModel, 16), (tiny.SIGLIP, SiglipVisionModel, 15)])
@pytest.mark.parametrize("with_tower", [True, False], ids=["tower in the checkpoint", "tower beside it"])
@torch.no_grad()
def test_towers_leave_out_the_first_token(write, towers, tower, tower_class, count, with_tower):
    """It is CLIP's class token, and the first patch of SigLIP, which has none."""
    folder, _, weights = write(tower=tower, with_tower=with_tower)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    hidden = tower_class.from_pretrained(towers / tower)(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    first, second = ("model.mm_projector.image_spatial_proj." + name for name in "02")
    expected = torch.nn.functional.gelu(hidden @ weights[first + ".weight"].T + weights[first + ".bias"])
    expected = expected @ weights[second + ".weight"].T + weights[second + ".bias"]
    found = features(load_published(folder, towers), pixels)
    assert found.shape[1] == count
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_tower_in_the_checkpoint_takes_precedence(write, towers):
    folder, _, weights = write()
    key = "model.image_tower.image_tower.vision_model.embeddings.class_embedding"
    weights[key] = weights[key] + 1
    save_file(weights, folder / "model.safetensors")
    model = load_published(folder, towers)
    assert torch.equal(model.model.vision_tower.state_dict()["embeddings.class_embedding"], weights[key])


# --- files


def change(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if value is None:
            settings.pop(name)
        else:
            settings[name] = value
    (folder / "config.json").write_text(json.dumps(settings))


def shard(weights, folder, suffix):
    """Write three shards and their index."""
    (folder / "model.safetensors").unlink()
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    names = sorted(weights)
    weight_map = {}
    for number in range(3):
        part = names[number::3]
        file = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        save({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def single_bin(weights, folder, **options):
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", **options)


FORMS = {
    "safetensors shards": lambda weights, folder: shard(weights, folder, "safetensors"),
    "bin shards": lambda weights, folder: shard(weights, folder, "bin"),
    "bin": single_bin,
    "bin before torch 1.6": lambda weights, folder: single_bin(weights, folder, _use_new_zipfile_serialization=False),
    "bin, transposed": lambda weights, folder: single_bin(
        {name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in weights.items()}, folder
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_file_layouts_load_the_same_model(write, towers, form, dtype):
    folder, _, weights = write("qwen")
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors")
    single = load_published(folder, towers)
    assert single.dtype == dtype
    expected = single.state_dict()
    FORMS[form](weights, folder)
    found = load_published(folder, towers).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_compressed_pickle(write, towers):
    folder, _, weights = write()
    expected = load_published(folder, towers).state_dict()
    single_bin(weights, folder)
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in entries.items():
            compressed.writestr(name, content)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_published(folder, towers).state_dict().items())


def test_another_dtype_on_request(write, towers):
    folder, *_ = write()
    assert load_published(folder, towers, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_the_embedding_table(write, towers, stored):
    folder, settings, weights = write()
    settings["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(settings))
    if not stored:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    model = load_published(folder, towers)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


def test_known_unused_weights_are_ignored(write, towers):
    folder, _, weights = write()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.image_tower.image_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, folder / "model.safetensors")
    load_published(folder, towers)


@torch.no_grad()
def test_a_stage_1_projector_alone_and_with_its_language_model(write, towers, tmp_path):
    folder, settings, weights = write("qwen", sparse=False)
    whole = load_published(folder, towers)
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    (stage1 / "config.json").write_text(json.dumps(settings))
    torch.save({name: tensor for name, tensor in weights.items() if "mm_projector" in name}, stage1 / "mm_projector.bin")
    base = {name: tensor for name, tensor in weights.items() if "mm_projector" not in name and "image_tower" not in name}
    base["lm_head.bias"] = torch.ones(tiny.VOCAB)  # the original code leaves it out
    language_model = tiny.write_published(tmp_path / "base", {k: v for k, v in settings.items() if not k.startswith("mm_")}, base)

    pixels = torch.randn(1, 3, 32, 32)
    for path in (stage1, stage1 / "mm_projector.bin"):
        model = load_published(path, towers)
        assert torch.equal(features(model, pixels), features(whole, pixels))
        assert model.lm_head.weight.is_meta  # no weights are made up

    joined = load_published(stage1, towers, language_model=language_model)
    assert all(torch.equal(tensor, joined.state_dict()[name]) for name, tensor in whole.state_dict().items())
    change(language_model, model_type="qwen", rotary_emb_base=10000.0)
    with pytest.raises(CheckpointError, match=r"has rope_parameters .*, but .* was trained with .*: they do not belong together"):
        load_published(stage1, towers, language_model=language_model)
    change(language_model, mm_image_tower=tiny.CLIP)
    with pytest.raises(CheckpointError, match="describes a whole LLaVA"):
        load_published(stage1, towers, language_model=language_model)
    with pytest.raises(CheckpointError, match="holds its own language model"):
        load_published(folder, towers, language_model=language_model)


# --- the placeholder


@torch.no_grad()
def test_a_sparse_models_placeholder_has_no_row(write, towers):
    folder, *_ = write()
    model = load_published(folder, towers)
    assert model.config.image_token_id == tiny.VOCAB
    ids = torch.tensor([[5] + [tiny.VOCAB] * 16 + [6]])
    assert model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits.shape == (1, 18, tiny.VOCAB)


@torch.no_grad()
def test_a_dense_models_placeholder_is_a_free_row(write, towers):
    folder, *_ = write(sparse=False)
    model = load_published(folder, towers)
    assert model.config.image_token_id == tiny.VOCAB - 1
    assert model.generation_config.suppress_tokens == [tiny.VOCAB - 1]
    ids = torch.tensor([[5] + [tiny.VOCAB - 1] * 16 + [6]])
    assert model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits.shape == (1, 18, tiny.VOCAB)


def test_a_tower_is_found_by_the_last_parts_of_a_path(write, towers):
    folder, *_ = write()
    for name in (f"/cache/{tiny.CLIP}", "/somewhere/clip-tiny"):
        change(folder, mm_image_tower=name)
        if "somewhere" in name:
            with pytest.raises(CheckpointError, match="is in none of"):
                load_published(folder, towers)
        load_published(folder, towers if "cache" in name else towers / "openai")


def test_changing_the_model_leaves_its_files_unchanged(write, towers):
    folder, _, weights = write()
    before = (folder / "model.safetensors").read_bytes()
    model = load_published(folder, towers)
    model.lm_head.weight.data.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], weights["lm_head.weight"])
