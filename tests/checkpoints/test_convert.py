"""Converted folders: their content, and that everything that loads such folders loads them."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor, pipeline

from moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaProcessor, load_published
from moe_llava.checkpoints.published import convert
from moe_llava.common.errors import CheckpointError
from tests.checkpoints import tiny_published as tiny
from tests.checkpoints.fresh import peak_of_conversion, run_without_package
from tests.checkpoints.tiny_tokenizers import write_phi, write_tiktoken
from tests.conftest import in_fresh_process, refused, run_here

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tiny.write_towers(tmp_path_factory.mktemp("towers"))


def published(folder, towers, family="qwen1_5", vocab_size=520, tokenizer=True, **options):
    settings = tiny.settings_of(family, vocab_size=vocab_size, **options)
    tiny.write_published(folder, settings, tiny.weights_of(settings, towers))
    if tokenizer and family == "qwen":
        write_tiktoken(folder, "qwen.tiktoken")
    elif tokenizer:
        write_phi(folder, fast=True)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, towers):
    """A converted sparse checkpoint, made by the command."""
    folder = tmp_path_factory.mktemp("converted")
    published(folder / "published", towers)
    result = run_here("convert", folder / "published", folder / "out", "--vision-towers", towers)
    assert result.exit_code == 0, result.stderr
    assert "moe_llava_qwen1_5: " in result.stdout
    assert "experts: 3, of which a token uses 2, in layers [1, 2]" in result.stdout
    return folder / "out"


def test_auto_classes_load_the_folder_with_the_same_weights(converted, towers):
    model = AutoModelForImageTextToText.from_pretrained(converted)
    assert type(model) is MoeLlavaForConditionalGeneration
    expected = load_published(converted.parent / "published", towers).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.eos_token_id == [500]
    assert model.generation_config.pad_token_id == 502
    processor = AutoProcessor.from_pretrained(converted)
    assert type(processor) is MoeLlavaProcessor
    assert processor.image_token_id == model.config.image_token_id == 520
    assert processor.image_processor.do_pad


def test_prompt_and_answer(converted):
    model, processor = AutoModelForImageTextToText.from_pretrained(converted), AutoProcessor.from_pretrained(converted)
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert prompt == f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    inputs = processor(text=prompt, images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    assert (inputs["input_ids"] == 520).sum() == 16
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_chat_and_pipeline(converted, tmp_path):
    Image.new("RGB", (50, 30)).save(tmp_path / "image.png")
    arguments = ("--image", tmp_path / "image.png", "--max-new-tokens", 4, "--json", "What is this?")
    answer = json.loads(run_here("chat", converted, *arguments).stdout)
    assert answer["question"] == "What is this?"
    content = [{"type": "image", "image": Image.new("RGB", (50, 30))}, {"type": "text", "text": "What is this?"}]
    output = pipeline("image-text-to-text", model=str(converted))(text=[{"role": "user", "content": content}], max_new_tokens=3)
    assert isinstance(output[0]["generated_text"], list)


def without_package(folder, out):
    out.mkdir()
    assert in_fresh_process(run_without_package, folder, out) == (False, "MoeLlavaForConditionalGeneration", "MoeLlavaProcessor")
    return torch.load(out / "logits.pt")


def test_the_folder_loads_without_the_package(converted, tmp_path):
    """The same holds for a folder that is saved there."""
    model, processor = AutoModelForImageTextToText.from_pretrained(converted), AutoProcessor.from_pretrained(converted)
    inputs = processor(text="<image>\nWhat is this?", images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(without_package(converted, tmp_path / "first"), expected)
    torch.testing.assert_close(without_package(tmp_path / "first", tmp_path / "second"), expected)


def test_a_converted_dense_checkpoint_can_be_upcycled(tmp_path, towers):
    published(tmp_path / "published", towers, sparse=False)
    convert(tmp_path / "published", tmp_path / "out", towers)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert (type(model), type(processor)) == (LlavaForConditionalGeneration, LlavaProcessor)
    assert processor.image_token_id == model.config.image_token_id == 519  # the tokenizer's own ids end at 502
    inputs = processor(text="<image>\nWhat?", images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    result = run_here("upcycle", tmp_path / "out", tmp_path / "sparse")
    assert result.exit_code == 0, result.output


def test_a_full_vocabulary_gets_one_more_row_in_a_dense_model(tmp_path, towers):
    published(tmp_path / "published", towers, sparse=False, vocab_size=503)
    convert(tmp_path / "published", tmp_path / "out", towers)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_token_id == model.config.image_token_id == 503
    inputs = processor(text="<image>\nWhat?", images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.shape[-1] == 504
    reference = load_published(tmp_path / "published", towers)(**inputs).logits
    torch.testing.assert_close(logits[..., :503], reference[..., :503])
    assert model.generation_config.suppress_tokens == [503]


def test_qwens_tokenizer_and_a_siglip_tower(tmp_path, towers):
    published(tmp_path / "published", towers, "qwen", vocab_size=1200, tower=tiny.SIGLIP)
    lines = convert(tmp_path / "published", tmp_path / "out", towers)
    assert any(line.startswith("not used, the pooling head of a SigLIP tower") for line in lines)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text="<image>\nWhat?", images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    assert (inputs["input_ids"] == 1200).sum() == 15
    assert model(**inputs).logits.shape[-1] == 1200
    assert processor._get_num_multimodal_tokens([[50, 30]])["num_image_tokens"] == [15]


@pytest.mark.parametrize(("family", "token", "end"), [("mistral", "<|end_of_turn|>", "<|end_of_turn|>"), ("mistral", None, "</s>")])
def test_a_mistral_with_the_end_of_turn_token_gets_the_openchat_template(tmp_path, towers, golden, family, token, end):
    folder = published(tmp_path / "published", towers, family, tokenizer=False)
    text = (golden / "tokenizers" / "llama_fast" / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text if token else text.replace("<|end_of_turn|>", "<|other|>"))
    config = json.loads((golden / "tokenizers" / "llama_fast" / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("added_tokens_decoder", "additional_special_tokens")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "out", towers)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    messages = [*QUESTION, {"role": "assistant", "content": "A cat."}]
    prompt = processor.apply_chat_template(messages)
    assert prompt == f"<s>{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A cat.{end}"
    ends = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert ends == sorted({processor.tokenizer.convert_tokens_to_ids(end), processor.tokenizer.eos_token_id})


def test_a_stage_1_projector(tmp_path, towers):
    folder = published(tmp_path / "base", towers, sparse=False)
    weights = tiny.weights_of(json.loads((folder / "config.json").read_text()))
    base = {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}
    settings = json.loads((folder / "config.json").read_text())
    language = tiny.write_published(tmp_path / "language", {k: v for k, v in settings.items() if not k.startswith("mm_")}, base)
    save_file(base | {"lm_head.bias": torch.ones(520)}, language / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "language" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({name: tensor for name, tensor in weights.items() if "mm_projector" in name}, tmp_path / "stage1" / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="holds a projector alone: name the language model"):
        convert(tmp_path / "stage1", tmp_path / "out", towers)
    lines = convert(tmp_path / "stage1", tmp_path / "out", towers, tmp_path / "language")
    assert "not used, the bias of the language model's head, which the original code leaves out: lm_head.bias" in lines
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_token_id == 519
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_a_checkpoint_without_tokenizer_is_converted_without_one(tmp_path, towers):
    published(tmp_path / "published", towers, tokenizer=False)
    result = run_here("convert", tmp_path / "published", tmp_path / "out", "--vision-towers", towers)
    assert "no tokenizer: " in result.stdout
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    told = refused("chat", tmp_path / "out", "What?")
    assert told.startswith(f"checkpoint {tmp_path / 'out'} has no tokenizer: save the processor there")


def test_a_tokenizer_larger_than_the_vocabulary_causes_a_warning(tmp_path, towers):
    folder = published(tmp_path / "published", towers, vocab_size=450)
    lines = convert(folder, tmp_path / "out", towers)
    assert any(line.startswith("warning: the tokenizer has ids up to 502, but the model's vocabulary ends at 449") for line in lines)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.image_token_id == 503
    assert model.generation_config.eos_token_id == 2  # the published one


def test_a_converted_folder_is_refused(converted, tmp_path, towers):
    with pytest.raises(CheckpointError, match="is no published checkpoint: it loads as it is"):
        convert(converted, tmp_path / "out", towers)


def test_a_tokenizer_without_the_end_token_is_refused(tmp_path, towers):
    folder = published(tmp_path / "published", towers)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|endoftext|>", "<|done|>"))
    with pytest.raises(CheckpointError, match=r"does not know <\|endoftext\|>"):
        convert(folder, tmp_path / "out", towers)


@pytest.mark.parametrize("damage", ["truncated", "no moe", "no tower", "no preprocessing"])
def test_a_refused_checkpoint_leaves_nothing_behind(tmp_path, towers, damage):
    folder = published(tmp_path / "published", towers)
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5])
    elif damage == "no moe":
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "moe"}))
    elif damage == "no tower":
        towers = tmp_path / "none"
    else:
        towers = tiny.write_towers(tmp_path / "towers")
        (towers / tiny.CLIP / "preprocessor_config.json").unlink()
    before = sorted(tmp_path.iterdir())
    refused("convert", folder, tmp_path / "new" / "out", "--vision-towers", towers)
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_kept(tmp_path, towers):
    folder = published(tmp_path / "published", towers)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(folder, tmp_path / "out", towers)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_existing_link_or_file_is_refused_before_any_work(tmp_path, towers):
    folder = published(tmp_path / "published", towers)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(folder, tmp_path / "link", towers)
    (tmp_path / "file").touch()
    refused("convert", folder, tmp_path / "file" / "out", "--vision-towers", towers)


def test_converted_dtypes_are_reported(tmp_path, towers):
    folder = published(tmp_path / "published", towers)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    routers = {name: tensor.float() for name, tensor in weights.items() if ".wg." in name}
    save_file(weights | routers, folder / "model.safetensors")
    lines = convert(folder, tmp_path / "out", towers)
    assert any(line.endswith("parameters in bfloat16") for line in lines)
    assert f"converted from float32: 2 of {len(weights)} tensors" in lines


def test_a_placeholder_in_the_vocabulary_is_never_generated(tmp_path, towers):
    folder = published(tmp_path / "published", towers)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 503, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(state))
    convert(folder, tmp_path / "out", towers)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_token_id == model.config.image_token_id == 503
    assert model.generation_config.suppress_tokens == [503]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[503] = model.get_input_embeddings().weight[5] * 100
    assert model.generate(input_ids=torch.tensor([[5, 5]]), max_new_tokens=3).shape == (1, 5)


def test_start_and_end_tokens_of_images_must_be_known(tmp_path, towers):
    folder = published(tmp_path / "published", towers)
    settings = json.loads((folder / "config.json").read_text()) | {"mm_use_im_start_end": True}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not know <im_start> and <im_end>"):
        convert(folder, tmp_path / "out", towers)


def test_other_commands_name_convert_for_a_published_checkpoint(tmp_path, towers):
    folder = published(tmp_path / "published", towers)
    assert "convert it with `moe-llava convert`" in refused("chat", folder, "What?")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_of_a_conversion(tmp_path, towers, form, monkeypatch):
    """At most 1.3 times the checkpoint's size, on top of what libraries need."""
    published(tmp_path / "warm", towers)
    monkeypatch.setattr(tiny, "FFN", 120_000)
    monkeypatch.setitem(tiny.FAMILIES["qwen1_5"], "intermediate_size", 120_000)
    folder = published(tmp_path / "published", towers)
    file = folder / "model.safetensors"
    if form == "bin":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
        file = folder / "pytorch_model.bin"
    size = file.stat().st_size
    assert size > 300e6
    assert in_fresh_process(peak_of_conversion, folder, towers, tmp_path / "out", tmp_path / "warm") < 1.3 * size
