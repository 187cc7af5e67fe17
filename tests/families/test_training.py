"""Stage III and its dense baseline, from an aligned model of any family."""

import json

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.training.budget import survey
from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from tests.families.processors import ROWS, tiny_checkpoint

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
        if not base.is_dir():
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
