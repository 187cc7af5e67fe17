"""A LLaVA is joined with any tower of transformers that returns a token for each patch; others are refused, with what was found."""

import json

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from moe_llava import upcycle
from moe_llava.checkpoints.join import join, joined_config
from moe_llava.checkpoints.load import load_checkpoint, load_processor
from moe_llava.common.errors import CheckpointError
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.routing.trace import trace_records
from moe_llava.training.budget import survey
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.training.test_recipes import parts  # noqa: F401

QUIET = Console(quiet=True)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
COMMON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CROP = COMMON | {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
SQUARE = COMMON | {"size": {"height": 32, "width": 32}}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
# The model, and the content of its preprocessor_config.json, as of published towers of the class.
TOWERS = {
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)), CROP),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)), SQUARE),
    # SigLIP 2 of fixed resolution has these classes, too.
    "siglip-whole": (lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SIZES)), SQUARE),
    "vit": (lambda: ViTModel(ViTConfig(**SIZES)), SQUARE),
    "vit-classifier": (lambda: ViTForImageClassification(ViTConfig(**SIZES)), COMMON | {"size": 32}),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**DINO)), CROP),
    "dinov2-classifier": (lambda: Dinov2ForImageClassification(Dinov2Config(**DINO)), CROP),
    # Published ones are trained at 518 pixels, but their preprocessing makes 224.
    "dinov2-larger": (lambda: Dinov2Model(Dinov2Config(**DINO | {"image_size": 64})), CROP),
    "dinov2-no-register": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=0)), CROP),
}
REFUSED = {
    "registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)),
        "it is a Dinov2WithRegistersModel, which puts 5 tokens before its patches, such as registers, but a LLaVA can leave out only one",
    ),
    "distilled": (lambda: DeiTModel(DeiTConfig(**SIZES)), "it is a DeiTModel, which puts 2 tokens before its patches"),
    "naflex": (
        lambda: Siglip2VisionModel(Siglip2VisionConfig(**{key: SIZES[key] for key in SIZES if key != "image_size"}, num_patches=16)),
        "it is a Siglip2VisionModel, which needs pixel_attention_mask, spatial_shapes besides pixel_values",
    ),
    "text": (
        lambda: BertModel(BertConfig(**TEXT)),
        "it is a BertModel, which takes input_ids, not pixel_values",
    ),
    "resnet": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        "it is a ResNetModel, with image_size None and patch_size None, which must be whole numbers",
    ),
    "convnext": (
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, num_hidden_layers=2)),
        r"it is a ConvNextModel, whose hidden states of an image have the shape \[1, 8, 8, 8\]: not a token",
    ),
    "swin": (
        lambda: SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)),
        r"it is a SwinModel, whose hidden states of an image have the shape \[1, 16, 16\]: not a token",
    ),
}


def write_tower(folder, make, preprocessing):
    torch.manual_seed(5)
    model = make()
    for parameter in model.parameters():  # many start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model.eval()


@pytest.fixture
def joined(parts, tmp_path):  # noqa: F811
    def make(make, preprocessing, **settings):
        tower = write_tower(tmp_path / "tower", make, preprocessing)
        chosen = {"language_model": str(parts / "phi"), "vision_tower": str(tmp_path / "tower"), "template": "phi"}
        return tower, *join(**chosen, seed=1, **settings), chosen

    return make


@pytest.fixture
def record(tmp_path):
    Image.new("RGB", (60, 40), (200, 90, 20)).save(tmp_path / "a.png")
    return Record("a", (("<image>\nWhat is it?", "A square."),), (tmp_path / "a.png",))


@pytest.mark.parametrize("name", TOWERS)
def test_features_are_the_patches_of_the_second_last_layer(name, joined, record, tmp_path):
    """One for each placeholder, without a class token; from the joined model and from the saved one."""
    tower, model, processor, _ = joined(*TOWERS[name])
    encoder = Encoder(processor)
    encoder.check_processor()
    item = encoder(record)
    pixels = item["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        seen = tower.vision_model if name == "siglip-whole" else tower
        states = seen(pixels, output_hidden_states=True).hidden_states[-2]
    patches = states[:, -16:]
    assert states.shape[1] - 16 == processor.num_additional_image_tokens == (0 if name.startswith("siglip") else 1)
    assert (item["input_ids"] == processor.image_token_id).sum() == model.config.image_seq_length == encoder.image_tokens == 16
    features = model.get_image_features(pixels, return_dict=True).pooler_output[0]
    torch.testing.assert_close(features, model.model.multi_modal_projector(patches)[0], rtol=0, atol=0)
    batch = {name: value[None] if value.dim() == 1 else value for name, value in item.items()}
    with torch.no_grad():
        expected = model(**batch)
        model.save_pretrained(tmp_path / "saved")
        processor.save_pretrained(tmp_path / "saved")
        again, processor = load_checkpoint(tmp_path / "saved")
        assert torch.equal(again(**batch).logits, expected.logits)
        assert torch.equal(Encoder(processor)(record)["input_ids"], item["input_ids"])
        sparse = upcycle(model)
        torch.testing.assert_close(sparse(**batch).logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2", "dinov2-larger"])
def test_stages_from_a_tower(name, joined, write_recipe, record, tmp_path):
    """Only the projector changes in stage I, the tower never; the result is traced with its patches in a grid."""
    _, model, _, chosen = joined(*TOWERS[name])
    steps = {f"stage{number}__optimisation__max_steps": 2 for number in (1, 2, 3)}
    recipe = load_recipe(write_recipe(model=chosen, stage1__template="plain", **steps, feature_cache=str(tmp_path / "cache"), seed=1))
    folders = train(recipe, [1, 2, 3], resume=False, console=QUIET)
    start, first, _, last = (
        each.state_dict() for each in (model, *(AutoModelForImageTextToText.from_pretrained(folder) for folder in folders))
    )
    changed = {key for key in start if not torch.equal(start[key], first[key])}
    assert changed == {key for key in start if "multi_modal_projector" in key}
    assert all(torch.equal(start[key], last[key]) for key in start if "vision_tower" in key)
    assert sum(survey(recipe)[0].total.values()) == sum(
        parameter.numel() for parameter in AutoModelForImageTextToText.from_pretrained(folders[2]).parameters()
    )
    (trace,) = trace_records(*load_checkpoint(folders[2]), [record], 1)
    places = trace.places_T3[trace.places_T3[:, 0] == 0]
    assert places[:, 1:].tolist() == [[row, column] for row in range(4) for column in range(4)]


def test_the_pooler_that_a_classifier_lacks_is_always_the_same(joined, parts):  # noqa: F811
    _, model, _, chosen = joined(*TOWERS["vit-classifier"])
    again, _ = join(**chosen, seed=1)
    assert any("pooler" in name for name in model.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name, joined, parts, tmp_path):  # noqa: F811
    make, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=f"^the vision tower {tmp_path / 'tower'} cannot be used: {message}"):
        joined(make, SQUARE)
    with pytest.raises(CheckpointError, match=message) as caught:
        joined_config(str(parts / "phi"), str(tmp_path / "tower"))  # from config.json alone
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        (CROP | {"crop_size": {"height": 24, "width": 24}}, "it is a ViTModel, which refuses images of 24 x 24 pixels: Input image size"),
        (COMMON | {"size": {"shortest_edge": 32}}, "makes images of several sizes, such as 32 x 42 and 42 x 32 pixels"),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused(joined, preprocessing, message):
    with pytest.raises(CheckpointError, match=message):
        joined(TOWERS["vit"][0], preprocessing)


def test_a_tower_that_drops_layers_at_random_is_not_cached(joined, write_recipe, tmp_path):
    *_, chosen = joined(lambda: Dinov2Model(Dinov2Config(**DINO, drop_path_rate=0.1)), CROP)
    recipe = load_recipe(write_recipe(model=chosen, stage1__template="plain", feature_cache=str(tmp_path / "cache")))
    with pytest.raises(RecipeError, match=r"the tower's features are random while it is trained with: drop_path_rate 0.1"):
        train(recipe, [1], resume=False, console=QUIET)


def test_an_older_processor_takes_what_it_lacks_from_the_tower(joined, tmp_path):
    _, model, processor, _ = joined(*TOWERS["dinov2"])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "processor_config.json"
    content = json.loads(file.read_text())
    for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
        del content[name]
    file.write_text(json.dumps(content))
    found = load_processor(tmp_path / "saved")
    assert (found.patch_size, found.num_additional_image_tokens, found.vision_feature_select_strategy) == (8, 1, "default")


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2", "dinov2-larger"])
def test_another_image_size_is_what_transformers_interpolates(name, joined, record, tmp_path):
    """The crop grows with the image, and the features are those of the tower with `interpolate_pos_encoding`, which DINOv2 always does."""
    make, preprocessing = TOWERS[name]
    tower, model, processor, chosen = joined(make, preprocessing, image_size=48)
    pixels = Encoder(processor)(record)["pixel_values"]
    assert pixels.shape[-2:] == (48, 48)
    images = processor.image_processor
    if preprocessing is CROP:
        assert (images.size["shortest_edge"], images.crop_size["height"]) == (54, 48)
    interpolated = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True, **interpolated).hidden_states[-2]
        found = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(found, expected, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, processor = load_checkpoint(tmp_path / "saved")
    ids = Encoder(processor)(record)["input_ids"]
    assert (ids == processor.image_token_id).sum() == 36 == again.config.image_seq_length
    with pytest.raises(CheckpointError, match=r"image_size is 50, but must be a multiple of 8, the patch size of the tower"):
        joined_config(chosen["language_model"], chosen["vision_tower"], 50)
