"""Features of the tower on disk: nothing changes but that images are looked at once."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AriaConfig, AutoModelForImageTextToText, InternVLConfig, LlavaConfig, Mistral3Config, PixtralVisionConfig

from moe_llava import upcycle
from moe_llava.training import features
from moe_llava.training.features import cached_features, check_cache
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.trainer import StageTrainer
from tests.conftest import tiny_dense, tiny_inputs
from tests.training.test_distributed import read_log

QUIET = Console(quiet=True)


@pytest.fixture
def model():
    dense = tiny_dense("llama")
    dense.model.vision_tower.requires_grad_(False)
    return dense


@pytest.fixture
def looked_at():
    """model -> a list of how many images its tower's first layer sees in each call from now on."""

    def watch(model):
        seen = []
        model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda _, arguments, output: seen.append(len(arguments[0])))
        return seen

    return watch


def look(model, pixels, folder):
    with cached_features(model, str(folder)):
        return model.get_image_features(pixels, vision_feature_layer=-2, vision_feature_select_strategy="default").pooler_output[0]


def entries(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_runs_end_as_without_and_the_next_stage_computes_nothing(write_recipe, tiny_base, tmp_path, monkeypatch, looked_at):
    begin = StageTrainer.begin
    runs = []

    def watch(trainer, step):
        begin(trainer, step)
        runs.append(looked_at(trainer.model))

    monkeypatch.setattr(StageTrainer, "begin", watch)
    file = write_recipe(stage1__optimisation__max_steps=7)  # more than an epoch
    shutil.copytree(tiny_base / "base", tmp_path / "run" / "stage2")
    seen = []
    for number in (1, 3):
        found = []
        for settings in ([], [f"feature_cache={tmp_path / 'cache'}"]):
            (folder,) = train(load_recipe(file, settings), [number], resume=False, console=QUIET)
            log = [(line["loss"], line["grad_norm"]) for line in read_log(folder)]
            found.append((log, AutoModelForImageTextToText.from_pretrained(folder).state_dict()))
            seen.append(sum(runs[-1]))
            shutil.rmtree(folder)
        (log, weights), (log_with, weights_with) = found
        assert log == log_with
        assert weights.keys() == weights_with.keys()
        assert all(torch.equal(weights[name], weights_with[name]) for name in weights)
    assert seen == [28, len(entries(tmp_path / "cache")), 12, 0]
    assert seen[1] < seen[0]


@pytest.mark.parametrize("layers", [-2, [1, -1], [2, -1]])
@pytest.mark.parametrize("strategy", ["default", "full"])
@torch.no_grad()
def test_features_are_those_of_the_tower(model, tmp_path, looked_at, layers, strategy):
    """Of whatever layers, with and without the class token, in a batch that knows some images and not others."""
    chosen = {"vision_feature_layer": layers, "vision_feature_select_strategy": strategy}
    model.config.vision_feature_layer = layers
    if isinstance(layers, list):
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(32, 32)
    pixels = tiny_inputs(batch=4)["pixel_values"]
    pixels[3] = pixels[0]
    expected = model.get_image_features(pixels, **chosen).pooler_output
    seen = looked_at(model)
    with cached_features(model, str(tmp_path)):
        model.get_image_features(pixels[1:2], **chosen)
        for _ in range(2):
            torch.testing.assert_close(model.get_image_features(pixels, **chosen).pooler_output, expected)
    assert seen == [1, 3]
    assert len(entries(tmp_path)) == 3
    model.get_image_features(pixels, **chosen)
    assert seen == [1, 3, 4]


def test_another_picture_tower_or_precision_is_computed_anew(model, tmp_path, looked_at):
    pixels = tiny_inputs(batch=1)["pixel_values"]
    seen = looked_at(model)
    before = look(model, pixels, tmp_path)
    assert torch.equal(look(model, pixels, tmp_path), before)
    assert len(seen) == 1
    changed = pixels.clone()
    changed[0, 0, 3, 3] += 1e-3
    look(model, changed, tmp_path)
    assert len(seen) == 2
    with torch.autocast("cpu", torch.bfloat16):
        look(model, pixels, tmp_path)
    assert len(seen) == 3
    model.model.vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    assert not torch.equal(look(model, pixels, tmp_path), before)
    assert len(seen) == 4
    config = copy.deepcopy(model.config)
    config.vision_config.hidden_act = "relu"  # the same weights, and another tower
    other = type(model)(config).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    seen = looked_at(other)
    assert not torch.equal(look(other, pixels, tmp_path), look(model, pixels, tmp_path))
    assert len(seen) == 1


def test_what_is_killed_leaves_nothing_half_written(model, tmp_path, monkeypatch):
    pixels = tiny_inputs(batch=1)["pixel_values"]
    save_file = features.save_file

    def half(entry, file):
        save_file(entry, file)
        file.write_bytes(file.read_bytes()[:-20])
        shutil.copy(file, file.with_name(".killed"))  # a process that is killed removes nothing
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        look(model, pixels, tmp_path)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [".killed"]
    monkeypatch.setattr(features, "save_file", save_file)
    assert torch.equal(look(model, pixels, tmp_path), look(model, pixels, tmp_path))
    (entry,) = entries(tmp_path)
    entry.write_bytes(entry.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{entry} is no whole entry of a cache, though its name says so .* remove it"):
        look(model, pixels, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            InternVLConfig(),
            "the model is of type internvl: only llava, llava_next, llava_onevision, vipllava, aya_vision are known",
        ),
        (Mistral3Config(), "the model is of type mistral3: only llava"),
        (AriaConfig(), "the model is of type aria: only llava"),
        (LlavaConfig(vision_config=PixtralVisionConfig()), "the model's tower, pixtral, computes all images of a batch as one"),
    ],
)
def test_models_that_use_more_than_the_hidden_states_of_each_image(config, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        check_cache(str(tmp_path), SimpleNamespace(config=config))


def test_where_features_cannot_be_kept(model, write_recipe, tmp_path):
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match="the features of a trainable tower cannot be kept in"), cached_features(model, str(tmp_path)):
        pass
    model.config.vision_config.attention_dropout = 0.1
    with pytest.raises(RecipeError, match=r"tower's features are random while it is trained with: attention_dropout 0\.1"):
        check_cache(str(tmp_path), upcycle(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"feature_cache is .*file, which is no folder"):
        train(load_recipe(write_recipe(feature_cache=str(tmp_path / "file"))), [1], resume=False, console=QUIET)
    with pytest.raises(RecipeError, match="sharding is set, but so is feature_cache"):
        load_recipe(write_recipe(feature_cache=str(tmp_path), sharding={"fsdp_size": 2}))
