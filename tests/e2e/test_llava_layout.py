"""A dense LLaVA as llava-hf/llava-1.5-7b-hf stores it, made tiny: upcycled from the command line, and asked."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.checkpoints.tiny_tokenizers import train
from tests.conftest import run_command

IMAGE, PAD, VOCAB = 500, 501, 512  # there 32000, 32001 and 32064
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# The part of its config.json that is not numbers of a size.
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": IMAGE,
    "model_type": "llava",
    "pad_token_id": PAD,
    "projector_hidden_act": "gelu",
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": VOCAB,
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava-1.5-tiny-hf")
    text = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "projection_dim": 16, "vocab_size": 32000,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**CONFIG, "text_config": text, "vision_config": vision}))
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**{key: value for key, value in text.items() if key not in ("architectures", "model_type")}),
        vision_config=CLIPVisionConfig(**{key: value for key, value in vision.items() if key != "model_type"}),
    )
    weights = LlavaForConditionalGeneration(config).half().state_dict()
    old = {}
    for name, tensor in weights.items():
        name = name.replace("model.language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.").replace(
            "model.multi_modal_projector", "multi_modal_projector"
        )
        old[name] = tensor
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = train(size=496)
    special = ["<unk>", "<s>", "</s>", "<spare>", "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    assert fast.convert_tokens_to_ids("<image>") == IMAGE
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    images = {
        "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.48, 0.46, 0.41], "image_processor_type": "CLIPImageProcessor", "image_std": [0.27, 0.26, 0.28],
        "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": 32},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 8, "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


@torch.no_grad()
def test_upcycle_and_ask(llava, tmp_path):
    made = run_command("upcycle", llava, tmp_path / "sparse", "--num-experts", "3")
    assert made.returncode == 0, made.stderr
    assert "sparse layers [0, 2]" in made.stdout
    dense, sparse = (AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32) for path in (llava, tmp_path / "sparse"))
    assert torch.equal(dense.lm_head.weight.half(), load_file(llava / "model.safetensors")["language_model.lm_head.weight"])
    processor = AutoProcessor.from_pretrained(tmp_path / "sparse")
    inputs = processor(text="USER: <image>\nWhat is this? ASSISTANT:", images=[Image.new("RGB", (40, 30))], return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == 16
    torch.testing.assert_close(sparse(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=1e-5)

    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    answered = run_command("chat", tmp_path / "sparse", "--image", tmp_path / "image.png", "--max-new-tokens", "3", "--json", "What?")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["question"] == "What?"
