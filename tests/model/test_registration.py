"""After `import moe_llava`, transformers' Auto classes and pipelines know the model; before anything is used, nothing heavy is loaded."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaProcessor, upcycle
from moe_llava.digits.base import image_processor
from moe_llava.digits.tokenizer import build_tokenizer
from moe_llava.model import MoeLlavaModel
from tests.conftest import tiny_config


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_loads_neither_torch_nor_transformers():
    assert python("import sys, moe_llava; print([name for name in ('torch', 'transformers') if name in sys.modules])") == "[]\n"


@pytest.mark.parametrize("order", ["import moe_llava; import transformers", "import transformers; import moe_llava"])
def test_auto_classes_know_the_model(order):
    code = f"{order}; from transformers import AutoConfig; print(type(AutoConfig.for_model('moe_llava')).__name__)"
    assert python(code) == "MoeLlavaConfig\n"


def test_auto_classes_that_are_in_use_already_learn_of_it():
    code = "from transformers import AutoConfig; import moe_llava; print(type(AutoConfig.for_model('moe_llava')).__name__)"
    assert python(code) == "MoeLlavaConfig\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "from transformers import pipeline",
        "from transformers import LlavaConfig",
        "from transformers import LlavaForConditionalGeneration",
        "from transformers import CLIPModel, Trainer",
        "import moe_llava.training.run",
        "import moe_llava.digits.base",
        "from moe_llava import upcycle",
    ],
)
def test_nothing_else_is_disturbed(statement):
    assert python(f"import moe_llava; {statement}; print('fine')") == "fine\n"


def test_unknown_names_are_attribute_errors():
    import moe_llava

    with pytest.raises(AttributeError, match="no attribute 'upcycled'"):
        moe_llava.upcycled  # noqa: B018


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved sparse model with the digits tokenizer and processor, random weights."""
    from transformers import LlavaForConditionalGeneration

    tokenizer = build_tokenizer()
    config = tiny_config("llama")
    config.image_token_id = tokenizer.image_token_id
    config.vision_config.image_size = 48
    folder = tmp_path_factory.mktemp("sparse")
    upcycle(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    MoeLlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("auto", ["AutoProcessor", "AutoModelForImageTextToText", "AutoModel", "AutoConfig"])
def test_each_auto_class_alone_loads_a_saved_folder(folder, auto):
    name = python(f"import moe_llava; from transformers import {auto}; print(type({auto}.from_pretrained({str(folder)!r})).__name__)")
    assert name.startswith("MoeLlava")


def test_a_saved_folder_loads_by_the_auto_classes(folder):
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is MoeLlavaForConditionalGeneration
    assert type(AutoModel.from_pretrained(folder)) is MoeLlavaModel
    assert type(AutoProcessor.from_pretrained(folder)) is MoeLlavaProcessor


def test_pipeline(folder):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (48, 48))}, {"type": "text", "text": "where is the red 7 ?"}],
        }
    ]
    answer = pipeline("image-text-to-text", model=str(folder))(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_processor_counts_placeholders_for_serving_engines(folder):
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (30, 60))
    ids = processor(text="<image> where", images=image)["input_ids"][0]
    expected = ids.count(processor.image_token_id)
    assert expected == 36
    assert processor._get_num_multimodal_tokens([[30, 60], [48, 48]])["num_image_tokens"] == [expected, expected]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_images_may_be_files(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    images = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    expected = processor(text=["<image> where", "<image> where"], images=images, return_tensors="pt")["pixel_values"]
    for given in (files, [[file] for file in files], images, [[image] for image in images]):
        found = processor(text=["<image> where", "<image> where"], images=given, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
    content = [{"type": "image", "path": files[0]}, {"type": "text", "text": "where ?"}]
    encoded = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(encoded["pixel_values"], expected[:1])


def test_processor_refuses_more_or_fewer_images_than_placeholders(folder):
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="found 2 <image> tokens and 1 images"):
        processor(text="<image> <image> where", images=[Image.new("RGB", (48, 48))])
