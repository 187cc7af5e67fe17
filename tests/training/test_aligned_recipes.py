"""The shipped recipes of finished vision-language models, from the configurations of what they name."""

import json

import pytest
from transformers import AutoConfig

from moe_llava.model.upcycling import sparse_config
from moe_llava.training.budget import survey
from moe_llava.training.recipe import load_recipe
from moe_llava.training.stage import load_structure, on_meta
from moe_llava.training.trainable import choose_parameters
from tests.conftest import REPOSITORY

# Sizes from the published config.json.
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
CONFIGURATIONS = {
    "Qwen/Qwen3-VL-2B-Instruct": AutoConfig.for_model(
        "qwen3_vl",
        text_config={
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16, "out_hidden_size": 2048,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
        tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": AutoConfig.for_model(
        "smolvlm",
        text_config={
            "model_type": "llama", "vocab_size": 49280, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
            "num_attention_heads": 15, "num_key_value_heads": 5,
        },
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512,
            "patch_size": 16,
        },
        scale_factor=4,
        tie_word_embeddings=False,
    ),
    "google/gemma-3-4b-it": AutoConfig.for_model(
        "gemma3",
        text_config={
            "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
        },
        vision_config=SIGLIP | {"image_size": 896, "vision_use_head": False},
    ),
    "OpenGVLab/InternVL3_5-1B-HF": AutoConfig.for_model(
        "internvl",
        text_config={
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        tie_word_embeddings=True,
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": AutoConfig.for_model(
        "llava_onevision",
        text_config={
            "model_type": "qwen2", "vocab_size": 152000, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
        vision_config=SIGLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 26, "image_size": 384, "vision_use_head": False},
        tie_word_embeddings=True,
    ),
}  # fmt: skip
# recipe: the size by which the model is known, in 1e9 parameters; layers, width, and width of the FFN
ALIGNED = {
    "qwen3-vl-2b": (2.13, 28, 2048, 6144),
    "smolvlm2-500m": (0.51, 32, 960, 2560),
    "gemma3-4b": (4.30, 34, 2560, 10240),
    "internvl3_5-1b": (0.90, 28, 1024, 3072),
    "llava-onevision-0.5b": (0.89, 24, 896, 4864),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_stage_3_alone(name, tmp_path):
    """Every other FFN becomes four experts; a dense baseline trains the same FFNs; memory and arithmetic are counted."""
    size, layers, width, ffn = ALIGNED[name]
    file = REPOSITORY / "recipes" / f"{name}.yaml"
    CONFIGURATIONS[load_recipe(file).model].save_pretrained(tmp_path)
    recipe, baseline = (load_recipe(file, [f"model={tmp_path}", *changes]) for changes in ([], ["stage3.dense=true"]))
    dense = load_structure(recipe.model)
    assert dense.num_parameters() / 1e9 == pytest.approx(size, abs=0.06)
    sparse = on_meta(sparse_config(dense.config, recipe.stage3.options))
    trained = choose_parameters(sparse, "stage3", sparse.config.moe_layer_indices).trained
    assert trained == {"experts": layers // 2 * 4 * 3 * width * ffn, "routers": layers // 2 * 4 * width}
    budget, costs = survey(recipe)
    assert budget.total["experts"] == trained["experts"]
    assert budget.total["tower"] > 80e6
    assert budget.total["projector"] > 0
    assert sum(budget.total.values()) == sparse.num_parameters()
    assert costs["stage3"].memory == 4 * sparse.num_parameters() + 12 * sum(trained.values())
    assert list(survey(baseline)[1]) == ["dense"]
    assert json.loads(json.dumps(budget.as_dict()))["language_model"]["active"] < sum(budget.total.values())
