"""The shipped recipes of the paper's models, from the configurations of what they name; and a LLaVA joined from parts, for real."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainingArguments,
)

from moe_llava.checkpoints.join import TEXT_LENGTH, join, joined_processor
from moe_llava.common.errors import CheckpointError
from moe_llava.data.encode import encode_record
from moe_llava.data.encoder import Encoder
from moe_llava.model import MoeLlavaForConditionalGeneration
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.budget import survey
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.stage import Stage, load_structure, on_meta
from moe_llava.training.trainable import choose_parameters
from moe_llava.training.trainer import training_arguments
from tests.checkpoints import tiny_published as tiny
from tests.checkpoints.tiny_tokenizers import write_phi, write_tiktoken
from tests.conftest import REPOSITORY
from tests.training.test_aligned_recipes import ALIGNED
from tests.training.test_budget import LANGUAGE_MODELS, TOWER

QUIET = Console(quiet=True)

# --- the shipped recipes

# Sizes from the published config.json. The hub's Qwen-1_8B has the layout of 2023, which counts both halves of a gated FFN.
QWEN_2023 = {
    "model_type": "qwen", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 24, "num_attention_heads": 16,
    "kv_channels": 128, "vocab_size": 151936, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True,
    "seq_length": 8192, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = Qwen3Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
    tie_word_embeddings=True,
)  # fmt: skip
SO400M = SiglipVisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14
)
HUB = {
    "stabilityai/stablelm-2-1_6b": LANGUAGE_MODELS["stablelm"],
    "Qwen/Qwen-1_8B": QWEN_2023,
    "microsoft/phi-2": LANGUAGE_MODELS["phi"],
    "openchat/openchat-3.5-1210": LANGUAGE_MODELS["openchat"],
    "Qwen/Qwen3-1.7B": QWEN3,
    "HuggingFaceTB/SmolLM2-1.7B": SMOLLM2,
    "openai/clip-vit-large-patch14-336": TOWER,
    "google/siglip-so400m-patch14-384": SO400M,
}
# recipe: parameters of the language model (of Phi without the bias of its head), layers, width, parameters of one FFN, and in 1e9 what a
# token uses and what there is, counted from the paper's configurations
PAPER = {
    "stablelm-1.6b": (1_644_515_328, 24, 2048, 3 * 2048 * 5632, (2.06, 2.89)),
    "qwen-1.8b": (1_836_828_672, 24, 2048, 3 * 2048 * 5504, (2.24, 3.05)),
    "phi2-2.7b": (2_779_683_840 - 51_200, 32, 2560, 2 * 2560 * 10240 + 10240 + 2560, (3.62, 5.30)),
    "openchat-7b": (7_241_748_480, 32, 4096, 3 * 4096 * 14336, (10.06, 15.70)),
}
TODAY = {
    "qwen3-1.7b": (1_720_574_976, 28, 2048, 3 * 2048 * 6144, None),
    "smollm2-1.7b": (1_711_376_384, 24, 2048, 3 * 2048 * 8192, None),
}
RECIPES = {**PAPER, **{f"{name}-384": facts for name, facts in PAPER.items()}, **TODAY}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder with the config.json, and nothing else, of what the recipes name."""
    folder = tmp_path_factory.mktemp("hub")
    for name, config in HUB.items():
        (folder / name).mkdir(parents=True)
        content = config if isinstance(config, dict) else config.to_dict()
        (folder / name / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def local(hub, tmp_path):
    """A shipped recipe, by name, whose parts are the folders of `hub`."""

    def local(name):
        parts = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml").model
        model = {"language_model": str(hub / parts.language_model), "vision_tower": str(hub / parts.vision_tower)}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"base": str(REPOSITORY / "recipes" / f"{name}.yaml"), "model": model}))
        return file

    return local


def test_every_recipe_is_looked_at():
    assert {file.stem for file in (REPOSITORY / "recipes").glob("*.yaml")} == {*RECIPES, *ALIGNED, "digits"}


@pytest.mark.parametrize("name", RECIPES)
def test_what_learns_in_each_stage(local, name):
    """Stage I: two linear layers with biases. II: these and the language model. III: copies of every other FFN, and routers without
    bias."""
    language_model, layers, width, ffn, _ = RECIPES[name]
    recipe = load_recipe(local(name))
    seen = 1152 if "siglip" in recipe.model.vision_tower else 1024
    projector = (seen + 1) * width + (width + 1) * width
    dense = load_structure(recipe.model)
    assert sum(choose_parameters(dense, "stage1", []).trained.values()) == projector
    assert sum(choose_parameters(dense, "stage2", []).trained.values()) == projector + language_model
    moe = recipe.stage3.options
    sparse = on_meta(sparse_config(dense.config, moe))
    learning = choose_parameters(sparse, "stage3", sparse.config.moe_layer_indices).trained
    assert learning == {"experts": layers // 2 * 4 * ffn, "routers": layers // 2 * 4 * width}
    assert (moe.num_experts_per_tok, moe.capacity_factor, moe.router_aux_loss_coef) == (2, 1.5, 0.01)
    assert dense.config.image_seq_length == (729 if seen == 1152 else 576)


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name][4]])
def test_the_papers_sizes(local, name):
    budget, stages = survey(load_recipe(local(name)))
    total, active = budget.language_model
    assert (round(active / 1e9, 2), round(total / 1e9, 2)) == RECIPES[name][4]
    assert list(stages) == ["stage1", "stage2", "stage3"]


@pytest.mark.parametrize("name", RECIPES)
def test_training_settings(name, monkeypatch):
    """The paper's rates and batches; on the paper's eight devices they follow from one, two and two accumulated batches."""
    recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
    assert (recipe.output, recipe.precision) == (f"runs/{name}", "bf16")
    monkeypatch.setattr(TrainingArguments, "world_size", 8)
    found = []
    for number in (1, 2, 3):
        stage, arguments = recipe.settings_of(number), training_arguments(Stage(recipe, number))
        accumulated = arguments.gradient_accumulation_steps
        assert accumulated * arguments.per_device_train_batch_size * 8 == stage.optimisation.batch_size
        assert (arguments.num_train_epochs, arguments.warmup_steps, arguments.weight_decay) == (1, 0.03, 0)
        found.append((arguments.learning_rate, stage.optimisation.batch_size, accumulated, stage.template, stage.image_aspect_ratio))
    last = 4 if "openchat" in name else 2
    assert found == [(1e-3, 256, 1, "plain", "square"), (2e-5, 128, 2, None, "pad"), (2e-5, 128, last, None, "pad")]


# --- recipes based on others


def test_a_base_fills_in_what_a_recipe_does_not_say(tmp_path):
    file = tmp_path / "mine.yaml"
    (tmp_path / "base.yaml").write_text((REPOSITORY / "recipes" / "phi2-2.7b.yaml").read_text())
    file.write_text("base: base.yaml\nmodel: {language_model: a/b}\nstage2: {data: {file: x.json, images: y}}\n")
    recipe, base = load_recipe(file), load_recipe(tmp_path / "base.yaml")
    assert (recipe.model.language_model, recipe.model.vision_tower) == ("a/b", base.model.vision_tower)
    assert [source.file for source in recipe.stage2.sources] == ["x.json"]
    assert (recipe.stage2.optimisation, recipe.stage3) == (base.stage2.optimisation, base.stage3)
    file.write_text("base: base.yaml\nmodel: a/llava\n")
    assert load_recipe(file).model == "a/llava"


def test_a_base_that_cannot_be(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: none.yaml\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml has base .*none\.yaml, which does not exist"):
        load_recipe(file)
    file.write_text("base: other.yaml\n")
    (tmp_path / "other.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(RecipeError, match=r"other\.yaml has base .*mine\.yaml, which is based on it in turn"):
        load_recipe(file)


def test_problems_of_a_model_in_parts(tmp_path):
    file = tmp_path / "mine.yaml"
    base = REPOSITORY / "recipes" / "phi2-2.7b.yaml"
    file.write_text(f"base: {base}\nmodel: {{language_modle: x}}\nstage1: {{image_aspect_ratio: padded}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert "unknown key model.language_modle; did you mean model.language_model?" in str(caught.value)
    assert "stage1.image_aspect_ratio is 'padded', but must be one of pad, square" in str(caught.value)
    with pytest.raises(RecipeError, match=r"model\.template is 'fi', but must be one of phi"):
        load_recipe(base, ["model.template=fi"])


# --- joining, for real


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Language models with their tokenizers, and towers, as the hub has them: `phi` has spare rows and a bias on its head, `tied` no spare
    row and no head of its own, `qwen` the layout of 2023; `clip` is a whole CLIP, `siglip` a tower."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }  # fmt: skip
    phi = PhiForCausalLM(PhiConfig(vocab_size=512, **sizes))
    torch.nn.init.normal_(phi.lm_head.bias)
    phi.to(torch.bfloat16).save_pretrained(folder / "phi")
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=503, num_key_value_heads=2, tie_word_embeddings=True, **sizes))
    tied.save_pretrained(folder / "tied")
    for name in ("phi", "tied"):
        write_phi(folder / name, fast=True)
    settings = tiny.settings_of("qwen", sparse=False, vocab_size=1200)
    bare = {key: value for key, value in settings.items() if not key.startswith(("mm_", "image_"))} | {"model_type": "qwen"}
    weights = {name: tensor for name, tensor in tiny.weights_of(settings).items() if "mm_projector" not in name}
    write_tiktoken(tiny.write_published(folder / "qwen", bare, weights), "qwen.tiktoken")
    towers = tiny.write_towers(folder / "towers")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    (folder / "clip" / "preprocessor_config.json").write_text((towers / tiny.CLIP / "preprocessor_config.json").read_text())
    (towers / tiny.SIGLIP).rename(folder / "siglip")
    return folder


def model_of(parts, language_model, tower, template="phi"):
    return {"language_model": str(parts / language_model), "vision_tower": str(parts / tower), "template": template}


@pytest.mark.parametrize(("language_model", "tower"), [("phi", "clip"), ("tied", "siglip")])
def test_joined_weights_are_those_of_the_parts(parts, language_model, tower):
    model, processor = join(**model_of(parts, language_model, tower), seed=1)
    origin = AutoModelForCausalLM.from_pretrained(parts / language_model, dtype=torch.float32)
    rows = origin.config.vocab_size
    for name, tensor in origin.base_model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name][: len(tensor)], tensor), name
    assert torch.equal(model.lm_head.weight[:rows], origin.get_output_embeddings().weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (language_model == "tied")
    seen = CLIPModel.from_pretrained(parts / tower).vision_model if tower == "clip" else SiglipVisionModel.from_pretrained(parts / tower)
    pixels = torch.randn(1, 3, 32, 32)
    expected = seen(pixels, output_hidden_states=True).hidden_states[-2][:, 1 if tower == "clip" else 0 :]
    assert torch.equal(model.get_image_features(pixels, return_dict=True).pooler_output[0], model.model.multi_modal_projector(expected)[0])
    # The placeholder is a row that no token has: a spare one, or one after a full vocabulary. It is never generated.
    assert processor.image_token_id == (511 if language_model == "phi" else 503)
    assert model.config.text_config.vocab_size == max(rows, processor.image_token_id + 1)
    assert model.generation_config.suppress_tokens == [processor.image_token_id]
    assert model.generation_config.eos_token_id == [500]
    assert processor.tokenizer.model_max_length == TEXT_LENGTH


def test_a_language_models_own_template_that_takes_strings_alone(parts, tmp_path):
    """What ends its turns, which is not the end of text, ends answers; the joined model can be asked as any other."""
    folder = shutil.copytree(parts / "phi", tmp_path / "own")
    turns = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|extra_0|>\\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    model, processor = join(str(folder), str(parts / "clip"), None, seed=1)
    assert model.generation_config.eos_token_id == [500, 502]
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    processor.save_pretrained(tmp_path / "saved")
    for each in (processor, AutoProcessor.from_pretrained(tmp_path / "saved")):
        prompt = each.apply_chat_template(question, add_generation_prompt=True)
        assert prompt == "user: <image>\nWhat?<|extra_0|>\nassistant: "
    inputs = processor(text=prompt, images=Image.new("RGB", (32, 32)), add_special_tokens=False, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_language_model_in_the_layout_of_2023(parts):
    """It computes what it computes there."""
    model, processor = join(**model_of(parts, "qwen", "clip", "qwen"), seed=1)
    settings = json.loads((parts / "qwen" / "config.json").read_text()) | {"model_type": "llava_qwen"}
    weights = {name: tensor for name, tensor in tiny.weights_of(settings | {"mm_image_tower": tiny.CLIP}).items() if "mm_proj" not in name}
    ids = torch.tensor([[5, 9, 300, 40, 2]])
    expected = tiny.compute(settings, weights, weights["transformer.wte.weight"][ids[0]])
    torch.testing.assert_close(model(input_ids=ids).logits[0], expected, atol=1e-4, rtol=1e-4)
    assert processor.tokenizer.decode(model.generation_config.eos_token_id) == "<|endoftext|>"
    assert processor.tokenizer.pad_token_id is not None


def test_the_seed_decides_the_projector_and_nothing_else(parts):
    first, again, other = (join(**model_of(parts, "phi", "clip"), seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    different = {name for name in first if not torch.equal(first[name], other[name])}
    assert different == {name for name in first if "multi_modal_projector" in name}


def test_joining_leaves_the_random_numbers_alone(parts):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    join(**model_of(parts, "phi", "clip"), seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("language_model", "tower"), [("phi", "siglip"), ("tied", "clip"), ("qwen", "siglip")])
def test_three_stages_from_parts(parts, write_recipe, tmp_path, language_model, tower):
    template = "qwen" if language_model == "qwen" else "phi"
    ratios = {"stage1__image_aspect_ratio": "square", "stage2__image_aspect_ratio": "pad"}
    steps = {f"stage{number}__optimisation__max_steps": 2 for number in (1, 2, 3)}
    recipe = load_recipe(write_recipe(model=model_of(parts, language_model, tower, template), stage1__template="plain", **ratios, **steps))
    folders = train(recipe, [1, 2, 3], resume=False, console=QUIET)
    for folder, pads in zip(folders, (False, True, True), strict=True):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        assert processor.image_processor.do_pad is pads
        assert processor.image_token_id == model.config.image_token_id
    assert isinstance(model, MoeLlavaForConditionalGeneration)
    start = join(**vars(recipe.model), seed=recipe.seed)[0].state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folders[0]).state_dict()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed == {name for name in start if "multi_modal_projector" in name}
    assert train(recipe, [1, 2, 3], resume=True, console=QUIET) == folders
    recipe.model.vision_tower = str(parts / "other")
    with pytest.raises(RecipeError, match=r"stage1 was made with model\.vision_tower .*, now .*other: choose another output"):
        train(recipe, [1, 2, 3], resume=True, console=QUIET)


def test_parts_that_do_not_do(parts, write_recipe, tiny_base, tmp_path):
    whole = model_of(parts, "phi", "clip")
    for change, message in (
        ({"language_model": str(tmp_path / "none")}, r"the language model .*none is not found: checkpoint .*none is not a folder"),
        ({"vision_tower": str(tmp_path / "none")}, r"the vision tower .*none cannot be loaded"),
        ({"vision_tower": str(parts / "phi")}, "phi cannot be used: it is a PhiModel, which takes input_ids, not pixel_values"),
        (
            {"language_model": str(tiny_base / "base")},
            r"base is a model with a vision tower already \(llava\): a LLaVA is named as `model`",
        ),
        ({"template": "chatml"}, r"the tokenizer in .*phi does not know <\|im_end\|>, which ends an answer in .* 'chatml'"),
        ({"template": None}, r"the tokenizer in .*phi has no chat template: name one of phi"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(load_recipe(write_recipe(model=whole | change)), [1, 2, 3], resume=False, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_processor_that_cannot_pad(tiny_base, write_recipe, tmp_path):
    from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

    base = tmp_path / "base"
    LlavaForConditionalGeneration.from_pretrained(tiny_base / "base").save_pretrained(base)
    processor = AutoProcessor.from_pretrained(tiny_base / "base")
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor.save_pretrained(base)
    with pytest.raises(RecipeError, match=r"image_aspect_ratio is pad, but the model's CLIPImageProcessor.* cannot pad to a square"):
        train(load_recipe(write_recipe(model=str(base), stage2__image_aspect_ratio="pad")), [1, 2], resume=False, console=QUIET)


def test_padding_shows_the_whole_image(parts, tiny_base):
    """A wide picture: padded, its sides are still there; cropped, they are not."""
    from PIL import Image

    image = Image.new("RGB", (96, 32), "black")
    image.paste("white", (0, 0, 16, 32))
    images = joined_processor(**model_of(parts, "phi", "clip")).image_processor
    assert images([image], return_tensors="pt")["pixel_values"].unique().numel() == 1
    images.do_pad = True
    assert images([image], return_tensors="pt")["pixel_values"].unique().numel() > 1


def test_a_joined_processor_trains_on_its_own_form(parts):
    """Padding that is also the end of text is learnt where it ends an answer."""
    processor = joined_processor(**model_of(parts, "phi", "clip"))
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    assert encode_record(record, processor.tokenizer) == encode_record(record, processor.tokenizer, "phi")
    Encoder(processor).check_processor()
