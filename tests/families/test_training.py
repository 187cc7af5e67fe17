"""Stage III and its dense baseline, from an aligned model of any family."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.training.budget import survey
from moe_llava.training.features import FAMILIES
from moe_llava.training.parts import PARTS, parts_of
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.conftest import REPOSITORY
from tests.families.processors import ROWS, tiny_checkpoint
from tests.training.conftest import stopping  # noqa: F401
from tests.training.test_distributed import read_log

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records with images of several sizes, with two images, and without."""
    folder = tmp_path_factory.mktemp("data")
    for number, size in enumerate(((40, 30), (20, 60), (33, 33), (24, 24))):
        Image.new("RGB", size, (60 * number, 200, 90)).save(folder / f"{number}.png")
    records = []
    for number in range(12):
        kind = number % 3
        names = [[f"{number % 4}.png"], [f"{number % 4}.png", f"{(number + 1) % 4}.png"], []][kind]
        question = "<image>\n" * len(names) + "What is in the picture?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A red square. " * (1 + number % 5)}]
        records.append({"id": str(number), "conversations": turns} | ({"image": names} if names else {}))
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def write_recipe(data, tmp_path):
    def write(family, steps=2, **settings):
        base = tmp_path / "base"
        if "model" not in settings and not base.is_dir():
            tiny_checkpoint(family, base)
        optimisation = {"learning_rate": 1e-2, "batch_size": 3, "per_device_batch_size": 3, "max_steps": steps, "warmup_ratio": 0.0}
        recipe = {
            "model": str(base),
            "output": str(tmp_path / "run"),
            "precision": "fp32",
            "logging_steps": 1,
            "save_steps": 1,
            "stage3": {
                "data": {"file": str(data / "train.json"), "images": str(data)},
                "optimisation": optimisation,
                "moe": {"num_experts": 4, "num_experts_per_tok": 2},
            },
        }
        for path, value in settings.items():
            place, (*parents, key) = recipe, path.split("__")
            for parent in parents:
                place = place.setdefault(parent, {})
            place[key] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return write


@pytest.mark.parametrize("family", sorted(ROWS))
def test_three_stages(family, write_recipe, data, tmp_path):
    """Each stage trains the parts that it names, in batches with images and of text alone; the tower stays as it is."""
    one = {"optimisation": {"learning_rate": 1e-2, "batch_size": 4, "per_device_batch_size": 4, "max_steps": 3, "group_by_length": True}}
    one["data"] = {"file": str(data / "train.json"), "images": str(data)}
    (tmp_path / "images.json").write_text(json.dumps([each for each in json.loads((data / "train.json").read_text()) if "image" in each]))
    first = one | {"data": {"file": str(tmp_path / "images.json"), "images": str(data)}}
    settings = {"stage1": first, "stage2": one, "stage3__optimisation__gradient_checkpointing": True}
    folders = train(load_recipe(write_recipe(family, **settings)), [1, 2, 3], resume=False, console=QUIET)
    models = [load_checkpoint(folder, dtype=torch.float32)[0] for folder in (tmp_path / "base", *folders)]
    changed = []
    for before, after in itertools.pairwise(models):
        states, parts = dict(before.named_parameters()), parts_of(after)
        differs = {name for name, value in after.named_parameters() if name not in states or not torch.equal(value, states[name])}
        changed.append({parts[name] for name in differs})
    assert changed[0] == {"projector"}
    assert {"projector", "attention", "FFN"} <= changed[1] <= set(PARTS) - {"tower"}
    assert changed[2] == {"experts", "router"}


@pytest.mark.parametrize("family", ["gemma3", "internvl", "qwen3_vl", "smolvlm"])
def test_stage_3_of_an_aligned_model(family, write_recipe, tmp_path):
    """Only experts and routers change, the folder loads by itself, and the dense baseline trains the same FFNs."""
    checkpointing = {"stage3__optimisation__gradient_checkpointing": True, "stage3__optimisation__group_by_length": True}
    (sparse,) = train(load_recipe(write_recipe(family, **checkpointing)), [3], resume=False, console=QUIET)
    (dense,) = train(load_recipe(write_recipe(family, stage3__dense=True)), [3], resume=False, console=QUIET)
    base, _ = load_checkpoint(tmp_path / "base", dtype=torch.float32)
    before = base.state_dict()
    for folder, trained in ((sparse, ("experts", "router")), (dense, ("mlp",))):
        model, processor = load_checkpoint(folder)
        changed = {name for name, value in model.state_dict().items() if name not in before or not torch.equal(value, before[name])}
        assert changed
        assert all(any(word in name.split(".") for word in trained) for name in changed), sorted(changed)
        assert type(processor) is type(AutoProcessor.from_pretrained(folder))
        assert type(model) is type(AutoModelForImageTextToText.from_pretrained(folder))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    budget, costs = survey(load_recipe(write_recipe(family)))
    assert sum(budget.total.values()) == sum(parameter.numel() for parameter in load_checkpoint(sparse)[0].parameters())
    assert min(budget.total[part] for part in ("tower", "attention", "FFN", "experts", "router")) > 0
    assert list(costs) == ["stage3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage3__optimisation__packing": True}, "Qwen3VLProcessor marks the tokens of images"),
        ({"feature_cache": "cache"}, "feature_cache is set, but the model is of type qwen3_vl: only llava, llava_next"),
        ({"stage3__image_aspect_ratio": "pad"}, "Qwen2VLImageProcessor cannot pad to a square"),
        ({"stage3__image_processor": {"max_pixel": 100}}, r"image_processor.max_pixel is no setting .*; did you mean max_pixels\?"),
    ],
)
def test_settings_that_do_not_fit_the_family(write_recipe, monkeypatch, tmp_path, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        train(load_recipe(write_recipe("qwen3_vl", **settings)), [3], resume=False, console=QUIET)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_features_change_nothing(family, write_recipe, tmp_path):
    """In a first run, which fills the cache, and in a second, which reads it."""
    weights = []
    for run, cache in (("plain", None), ("fills", str(tmp_path / "cache")), ("reads", str(tmp_path / "cache"))):
        recipe = load_recipe(write_recipe(family, output=str(tmp_path / run), feature_cache=cache))
        weights.append(load_file(train(recipe, [3], False, QUIET)[0] / "model.safetensors"))
    plain, *others = weights
    for name, weight in plain.items():
        for other in others:
            torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=0)


def test_settings_of_images(write_recipe, tmp_path):
    """`max_pixels` decides on the number of tokens, and stays with the finished stage."""
    (whole,) = train(load_recipe(write_recipe("qwen3_vl", stage3__image_processor={"max_pixels": 1024})), [3], False, QUIET)
    _, processor = load_checkpoint(whole)
    assert processor.image_processor.size.longest_edge == 1024
    _, before = load_checkpoint(tmp_path / "base")
    record = Record("large", (("<image>\nWhat?", "A."),), (tmp_path,))
    lengths = [len(Encoder(each).measure(record, [(300, 300)])[0]["labels"]) for each in (processor, before)]
    assert lengths[1] - lengths[0] == 64 - 16


def check_same_weights(whole, resumed):
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_resumed_run_ends_with_the_same_weights(write_recipe, tmp_path, stopping):  # noqa: F811
    (whole,) = train(load_recipe(write_recipe("qwen3_vl", output=str(tmp_path / "whole"), steps=3)), [3], False, QUIET)
    recipe = load_recipe(write_recipe("qwen3_vl", steps=3))
    with stopping(2):
        train(recipe, [3], False, QUIET)
    (resumed,) = train(recipe, [3], True, QUIET)
    check_same_weights(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}], ids=["FSDP2", "FSDP2 and EP"])
def test_two_processes_in_parts_do_what_one_does(write_recipe, data, tmp_path, sharding):
    """Images of several sizes, two batches a step, the balance loss left out: it multiplies two means over what a process sees."""
    records = [record for record in json.loads((data / "train.json").read_text()) if "image" in record]
    (tmp_path / "images.json").write_text(json.dumps(records))
    settings = {"stage3__data__file": str(tmp_path / "images.json"), "stage3__moe__router_aux_loss_coef": 0.0, "steps": 2}
    settings |= {"stage3__optimisation__batch_size": 4, "stage3__optimisation__per_device_batch_size": 2}
    (one,) = train(load_recipe(write_recipe("qwen3_vl", **settings, output=str(tmp_path / "one"))), [3], False, QUIET)
    file = write_recipe("qwen3_vl", **settings, output=str(tmp_path / "two"), sharding=sharding)
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2", "-m", "tests.families.cli", "train", file]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two" / "stage3"
    for expected, found in zip(read_log(one), read_log(two), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-3
    assert type(load_checkpoint(two)[0]) is type(load_checkpoint(one)[0])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3"])
def test_gradient_accumulation_weighs_the_dense_baseline_by_labels(family, write_recipe, tmp_path):
    """Records have answers of several lengths: the mean of two batches is not the mean over their labels."""
    weights = []
    for per_device in (6, 2):
        settings = {"stage3__optimisation__batch_size": 6, "stage3__optimisation__per_device_batch_size": per_device, "steps": 1}
        recipe = load_recipe(write_recipe(family, output=str(tmp_path / str(per_device)), stage3__dense=True, **settings))
        (folder,) = train(recipe, [3], False, QUIET)
        weights.append((load_file(folder / "model.safetensors"), read_log(folder)[0]["loss"]))
    (whole, loss), (parts, other) = weights
    assert other == pytest.approx(loss, rel=1e-5)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=2e-4, rtol=0)  # a step of AdamW changes weights by 1e-2


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_batch_without_labels_adds_nothing_to_the_loss(family, write_recipe, data, tmp_path):
    """Its only record is left out, as its image is damaged."""
    (tmp_path / "0.png").write_bytes((data / "0.png").read_bytes()[:60])
    (tmp_path / "1.png").write_bytes((data / "1.png").read_bytes())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red square."}]
    (tmp_path / "two.json").write_text(json.dumps([{"id": name, "image": f"{name}.png", "conversations": turns} for name in "01"]))
    settings = {"stage3__optimisation__batch_size": 2, "stage3__optimisation__per_device_batch_size": 1, "steps": 1}
    settings |= {"stage3__data": {"file": str(tmp_path / "two.json"), "images": str(tmp_path)}, "on_bad_record": "skip"}
    (folder,) = train(load_recipe(write_recipe(family, stage3__dense=True, **settings)), [3], False, QUIET)
    (line,) = read_log(folder)
    assert line["skipped"] == 1
    assert 0 < line["loss"] < 20  # finite


@pytest.mark.parametrize("family", sorted(ROWS))
def test_a_teacher_with_the_same_weights_has_nothing_to_teach_at_first(family, write_recipe, tmp_path):
    """The dense model teaches itself made sparse: in the first step its predictions of every label are those of the model. Records have
    images of several sizes, several images, and none."""
    taught = {"teacher": str(tmp_path / "base"), "weight": 0.5}
    (live,) = train(load_recipe(write_recipe(family, stage3__distillation=taught)), [3], False, QUIET)
    (cached,) = train(load_recipe(write_recipe(family, stage3__dense=True, stage3__distillation=taught | {"top_k": 5})), [3], False, QUIET)
    for folder in (live, cached):
        first, second = read_log(folder)
        assert abs(first["distillation_loss"]) < 1e-5
        assert second["distillation_loss"] > 1e-4
