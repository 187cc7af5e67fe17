"""Processors of older folders are completed from the configuration, or refused by name; all that is saved pads on the left."""

import json
import shutil

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from moe_llava.checkpoints.load import load_checkpoint, load_processor
from moe_llava.common.errors import CheckpointError
from moe_llava.digits.base import build_base
from moe_llava.model import MoeLlavaProcessor, upcycle
from moe_llava.training.run import train
from tests.conftest import refused, run_here
from tests.training.conftest import tiny_base, write_recipe  # noqa: F401
from tests.training.test_run import QUIET

SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token")


@pytest.fixture
def old(tiny_base, tmp_path):  # noqa: F811
    """Copies the tiny checkpoint, with other settings of its processor; those that are Ellipsis are left out. Its tokenizer pads on the
    right, as older ones do, whether its file says so or not."""

    def make(padding="right", **settings):
        folder = tmp_path / "old"
        shutil.copytree(tiny_base / "base", folder)
        content = json.loads((folder / "processor_config.json").read_text()) | settings
        (folder / "processor_config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": padding}
        (folder / "tokenizer_config.json").write_text(json.dumps({key: tokenizer[key] for key in tokenizer if tokenizer[key] is not ...}))
        assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
        return folder

    return make


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": ...},
        {"patch_size": None, "num_additional_image_tokens": 0},
        {"vision_feature_select_strategy": None},
        {"num_additional_image_tokens": ...},
        {"image_token": ...},
        dict.fromkeys(SETTINGS, ...),
        dict.fromkeys(SETTINGS),
    ],
    ids=str,
)
def test_settings_that_an_older_processor_lacks(old, tiny_base, settings):  # noqa: F811
    expected, processor = load_processor(tiny_base / "base"), load_processor(old(**settings))
    for name in (*SETTINGS, "image_token_id"):
        assert getattr(processor, name) == getattr(expected, name), name
    inputs = processor(images=Image.new("RGB", (60, 40)), text="<image> which digit is green ?", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 36


def test_a_folder_with_the_image_processor_alone(old):
    """The first LLaVA checkpoints were saved so, with a preprocessor_config.json."""
    folder = old()
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    processor = load_processor(folder)
    assert (processor.patch_size, processor.num_additional_image_tokens, processor.vision_feature_select_strategy) == (8, 1, "default")


def test_a_placeholder_by_another_name(old):
    folder = old(image_token=...)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<image>", "<picture>"))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({key: tokenizer[key] for key in tokenizer if key != "image_token"}))
    processor = load_processor(folder)
    assert (processor.image_token, processor.image_token_id) == ("<picture>", 4)
    change(folder / "config.json", image_token_index=5000)
    with pytest.raises(CheckpointError, match=r"it lacks image_token, and no token has the image_token_id 5000 of config.json"):
        load_processor(folder)


@pytest.mark.parametrize(
    "settings", [{"patch_size": 14}, {"num_additional_image_tokens": 0}, {"vision_feature_select_strategy": "full"}], ids=str
)
def test_another_number_of_features_is_refused(old, settings):
    folder = old(**settings)
    for arguments in (("chat", folder, "hi"), ("upcycle", folder, folder.parent / "out"), ("serve", folder, "--port", "0")):
        told = refused(*arguments)
        assert told.startswith(f"the processor of {folder} cannot be loaded: it has patch_size")
        assert "by its config.json they are 8, 'default', 1" in told


def test_an_unknown_tower(old):
    folder = old(patch_size=...)
    change(folder / "config.json", vision_config={"model_type": "siglip2_vision_model"})
    with pytest.raises(CheckpointError, match="it lacks patch_size, and the tower's features are not known: it is a Siglip2VisionModel"):
        load_processor(folder)


@pytest.mark.parametrize("padding", ["right", ...])
def test_results_from_an_older_folder_are_complete(old, write_recipe, padding):  # noqa: F811
    """Results of upcycling and training load with transformers alone, and pad on the left."""
    folder = old(padding, **dict.fromkeys(SETTINGS, ...))
    MoeLlavaProcessor.from_llava(AutoProcessor.from_pretrained(folder)).save_pretrained(folder.parent / "by-hand")
    assert AutoTokenizer.from_pretrained(folder.parent / "by-hand").padding_side == "left"
    assert run_here("upcycle", folder, folder.parent / "sparse").exit_code == 0
    stages = train(load(write_recipe(model=str(folder))), [1, 2], resume=False, console=QUIET)
    for made in (folder.parent / "sparse", *stages):
        processor = AutoProcessor.from_pretrained(made)
        assert (processor.patch_size, processor.num_additional_image_tokens, processor.tokenizer.padding_side) == (8, 1, "left"), made
    assert run_here("chat", folder, "hello", "--max-new-tokens", "2").exit_code == 0


def load(file):
    from moe_llava.training.recipe import load_recipe

    return load_recipe(file)


def test_a_padded_batch_equals_its_rows_alone(old):
    """The tokenizer of this older folder pads on the right."""
    model, processor = load_checkpoint(old())
    questions = [
        "which digit is green ?",
        "how many digits are there in the image and which is larger , the blue digit or the green digit ?",
    ]
    texts = [f"<s> USER: <image> {question} ASSISTANT:" for question in questions]
    images = [Image.new("RGB", (60, 40), "blue")] * 2

    def answers(texts, images):
        inputs = processor(images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
        return model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()

    for sparse in (False, True):
        model = upcycle(model).eval() if sparse else model
        assert answers(texts, images) == [answers([text], [image])[0] for text, image in zip(texts, images, strict=True)]


def test_the_digits_world_pads_on_the_left(tmp_path):
    _, processor = build_base()
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.padding_side == "left"
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).padding_side == "left"
