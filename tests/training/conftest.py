"""A small data set, and a recipe over a tiny model, for runs that take seconds."""

import contextlib

import pytest
import yaml

from moe_llava.digits.base import image_processor
from moe_llava.digits.dataset import write_dataset
from moe_llava.digits.tokenizer import build_tokenizer
from moe_llava.training import run
from tests.conftest import REPOSITORY, tiny_config


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a tiny random dense LLaVA that speaks the digits world, and the world's data in small."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    config = tiny_config("llama")
    config.image_token_id = tokenizer.image_token_id
    config.vision_config.image_size = 48
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "base")
    LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder / "base")
    write_dataset(folder / "data", train_images=24, test_images=4)
    return folder


@pytest.fixture(scope="session")
def wide_base(tiny_base, tmp_path_factory):
    """A folder like the tiny dense LLaVA, whose widths are multiples of 64, as 4 bits need."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = tmp_path_factory.mktemp("wide")
    config = LlavaForConditionalGeneration.config_class.from_pretrained(tiny_base / "base")
    config.text_config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 32})
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor.from_pretrained(tiny_base / "base").save_pretrained(folder)
    return folder


@pytest.fixture
def write_recipe(tiny_base, tmp_path):
    """Writes recipe.yaml into tmp_path: the shipped digits recipe over the tiny base, a few steps a stage; `settings` change it."""

    def write(**settings):
        raw = yaml.safe_load((REPOSITORY / "recipes" / "digits.yaml").read_text())
        raw |= {"model": str(tiny_base / "base"), "output": str(tmp_path / "run"), "precision": "fp32", "logging_steps": 1, "save_steps": 2}
        for stage, name in (("stage1", "captions"), ("stage2", "train"), ("stage3", "train")):
            raw[stage]["data"] = {"file": str(tiny_base / "data" / f"{name}.json"), "images": str(tiny_base / "data" / "images")}
            raw[stage]["optimisation"] |= {"batch_size": 4, "per_device_batch_size": 4, "max_steps": 3}
        for path, value in settings.items():
            place = raw
            *parents, key = path.split("__")
            for parent in parents:
                place = place[parent]
            place[key] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(raw))
        return file

    return write


@pytest.fixture
def put_stage(tiny_base, tmp_path):
    """Puts the tiny base in the place of a finished stage, by its number, for tests of the stage after it."""

    def put(number, output=tmp_path / "run", base=tiny_base / "base"):
        if number > 0:
            output.mkdir(exist_ok=True)
            (output / f"stage{number}").symlink_to(base)

    return put


class Stopped(Exception):
    """As if the process had ended."""


@pytest.fixture
def stopping(monkeypatch):
    """A context in which training raises Stopped after a step."""

    @contextlib.contextmanager
    def after(step):
        def stop(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(run.ProgressDisplay, "on_step_end", stop)
            with pytest.raises(Stopped):
                yield

    return after
