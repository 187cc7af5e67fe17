"""Exports to native MoE architectures: they compute the same, and are read back."""

import json
import os
import re
import subprocess
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.checkpoints.native import TARGETS, export_native, import_native, write_native
from moe_llava.checkpoints.processors import sparse_processor
from moe_llava.common.errors import CheckpointError
from tests.conftest import REPOSITORY, refused, run_here
from tests.training.conftest import tiny_base  # noqa: F401
from tests.vlm import tiny_vlm, vlm_inputs

PAGE = REPOSITORY / "docs" / "engines.md"
EXPORTS = {  # (family, every layer) -> the architecture of the language model
    ("llava", False): "qwen2_moe",
    ("llava", True): "mixtral",
    ("llava_next", False): "qwen2_moe",
    ("llava_onevision", False): "qwen2_moe",
    ("llava_onevision", True): "qwen2_moe",
    ("vipllava", True): "mixtral",
    ("smolvlm", False): "qwen2_moe",
    ("idefics3", True): "mixtral",
    ("mistral3", True): "mixtral",
    ("ovis2", False): "qwen2_moe",
    ("internvl", False): "qwen3_moe",
    ("internvl", True): "qwen3_moe",
    ("qwen3_vl", False): "qwen3_vl_moe_text",
    ("qwen3_vl", True): "qwen3_vl_moe_text",
    ("qwen3_5", True): "qwen3_5_moe_text",
}


def test_every_target_is_exported():
    assert {target.text for targets in TARGETS.values() for target in targets} == set(EXPORTS.values())


def table():
    lines = ["| dense model | target | MoE layers | weights sum to 1 | added as zeros |", "|---|---|---|---|---|"]
    for origin, targets in TARGETS.items():
        for target in targets:
            name = f"`{target.wrapper}`" if target.wrapper else f"the same wrapper, its language model `{target.text}`"
            zeros = ", ".join(zero.rstrip(".").rpartition("mlp.")[2] for zero in target.zeros if zero.startswith("mlp."))
            zeros += ", biases of query, key and value" if any("bias" in zero for zero in target.zeros) else ""
            source = f"`{origin}`" if target.wrapper else f"any wrapper with `{origin}`"
            layers = "all, or `--every-layer`" if target.every_layer else "any"
            lines.append(f"| {source} | {name} | {layers} | {'required' if target.normalised else 'or not'} | {zeros or 'nothing'} |")
    return "\n".join(lines)


def test_the_page_has_the_table():
    begin, end = "<!-- begin of the table -->", "<!-- end of the table -->"
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page = f"{before}{begin}\n{table()}\n{end}{after}"
    if "UPDATE_ENGINES" in os.environ:
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "UPDATE_ENGINES=1 pytest tests/checkpoints/test_native.py writes it"


CUT, SHARED = {"granularity": 2, "num_shared_experts": 1}, {"num_shared_experts": 1}
CASES = [
    *((*names, {}) for names in EXPORTS),
    ("internvl", False, {"granularity": 3}),
    ("qwen3_vl", True, {"granularity": 2, "moe_layers": "all"}),
    ("llava", False, CUT),
    ("qwen3_5", True, CUT | {"moe_layers": "all"}),
    ("llava_onevision", True, SHARED),
]


@pytest.mark.parametrize(("family", "every_layer", "options"), CASES, ids=str)
@torch.no_grad()
def test_an_export_computes_the_same_and_is_read_back(family, every_layer, options, tmp_path):
    sparse, inputs = upcycle(tiny_vlm(family), num_experts=4, expert_start="noise", **options), vlm_inputs(family)
    real, expected = inputs["attention_mask"].bool(), sparse(**inputs).logits
    export_native(sparse, every_layer).save_pretrained(tmp_path)
    native = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(native).__module__.startswith("transformers.")
    assert native.config.get_text_config().model_type == EXPORTS[family, every_layer]
    assert (native(**inputs).logits - expected)[real].abs().max() <= 1e-6 * expected.abs().max()
    back = import_native(native)
    assert torch.equal(back(**inputs).logits, expected)
    assert back.config.to_dict() == sparse.config.to_dict()


LAYER = "language_model.model.layers.{}.".format
LAYOUTS = {  # (family, every layer) -> shapes of stored tensors
    ("llava", False): {
        LAYER(0) + "mlp.experts.3.gate_proj.weight": [48, 32],
        LAYER(0) + "mlp.gate.weight": [4, 32],
        LAYER(0) + "mlp.shared_expert.down_proj.weight": [32, 128],
        LAYER(0) + "mlp.shared_expert_gate.weight": [1, 32],
        LAYER(0) + "self_attn.q_proj.bias": [32],
        LAYER(1) + "mlp.gate_proj.weight": [48, 32],
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": [32, 16],
    },
    ("llava", True): {LAYER(1) + "block_sparse_moe.experts.3.w2.weight": [32, 48], LAYER(1) + "block_sparse_moe.gate.weight": [4, 32]},
    ("internvl", False): {LAYER(0) + "mlp.experts.0.down_proj.weight": [32, 48]},
    ("qwen3_vl", False): {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": [4, 32, 96],
        "model.language_model.layers.0.mlp.experts.down_proj": [4, 48, 32],
    },
}


@pytest.mark.parametrize(("family", "every_layer"), LAYOUTS, ids=str)
def test_files_have_the_published_layout(family, every_layer, tmp_path):
    """Engines expect single experts, those of Qwen3-VL-MoE transposed, and the fields of published configurations."""
    export_native(upcycle(tiny_vlm(family), num_experts=4), every_layer).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in LAYOUTS[family, every_layer]} == LAYOUTS[family, every_layer]
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["num_experts"], text["num_experts_per_tok"], text["norm_topk_prob"], text["head_dim"]) == (4, 2, True, 8)


@pytest.mark.parametrize(
    ("family", "options", "every_layer", "reason"),
    [
        ("gemma3", {}, False, "a language model of type gemma3_text has no native MoE architecture; those with one are qwen3_vl, "),
        ("qwen3_5", {}, False, "qwen3_5_moe_text has a router in every layer: export dense layers as equal experts (--every-layer)"),
        ("qwen3_vl", {"norm_topk_prob": False}, False, "the expert weights of qwen3_vl_moe_text sum to 1, but norm_topk_prob is false"),
        ("internvl", {"norm_topk_prob": False}, True, "equal experts compute a dense layer only if their weights sum to 1"),
        ("llava", {"use_residual": True}, False, "no native architecture can express a residual MLP"),
        ("qwen3_vl", SHARED, False, "qwen3_vl_moe_text has no shared expert"),
        ("qwen3_vl", {"granularity": 2}, True, "equal experts are as wide as a dense FFN, but granularity is 2"),
        ("llava", {"router_bias_rate": 0.1}, False, "no native architecture can express a bias of the selection"),
        ("llava", {"capacity_factor": 1.5}, False, "no native architecture can express capacity_factor 1.5"),
        ("llava", {"routing": "modality_split", "num_experts": 4}, False, "no native architecture can express routing modality_split"),
    ],
)
def test_a_model_that_no_architecture_can_express(family, options, every_layer, reason):
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        export_native(upcycle(tiny_vlm(family), **options), every_layer)


def test_fields_that_an_architecture_lacks():
    dense = tiny_vlm("internvl")
    dense.config.text_config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(CheckpointError, match=r"qwen3_moe cannot express layer_types \['full_attention', 'sliding_attention', "):
        export_native(upcycle(dense))


def test_no_export(tmp_path):
    with pytest.raises(CheckpointError, match="LlavaForConditionalGeneration is not a sparse model of this package"):
        export_native(tiny_vlm("llava"))
    with pytest.raises(CheckpointError, match="LlavaForConditionalGeneration is no export of this package"):
        import_native(tiny_vlm("llava"))


def test_the_verbs(tiny_base, tmp_path):  # noqa: F811
    """upcycle --native writes what upcycle and export write; convert reads it back; a process without this package loads it."""
    sparse, exported, at_once, back = (tmp_path / name for name in ("sparse", "exported", "at_once", "back"))
    assert run_here("upcycle", tiny_base / "base", sparse).exit_code == 0
    done = run_here("export", sparse, exported)
    assert done.exit_code == 0, done.output
    assert "LlavaForConditionalGeneration, language model qwen2_moe" in done.output
    assert "in float32, reloaded without this package: within" in done.output
    assert run_here("upcycle", tiny_base / "base", at_once, "--native").exit_code == 0
    assert load_file(at_once / "model.safetensors").keys() == load_file(exported / "model.safetensors").keys()
    done = run_here("convert", exported, back)
    assert done.exit_code == 0, done.output
    weights, restored = load_file(sparse / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(restored[name], weight) for name, weight in weights.items())
    assert restored.keys() == weights.keys()
    assert json.loads((exported / "processor_config.json").read_text())["processor_class"] == "LlavaProcessor"


def test_the_export_is_checked_without_a_second_model_in_memory(tiny_base, tmp_path, monkeypatch):  # noqa: F811
    dense, processor = load_checkpoint(tiny_base / "base")
    sparse, run, left = upcycle(dense), subprocess.run, []
    weights = [weakref.ref(parameter) for parameter in sparse.parameters()]
    del dense

    def count(*arguments, **settings):
        left.append(sum(weight() is not None for weight in weights))
        return run(*arguments, **settings)

    monkeypatch.setattr(subprocess, "run", count)
    write_native(sparse, sparse_processor(processor), tmp_path / "out")
    assert left == [0]


def test_mistakes_are_reported(tiny_base, tmp_path):  # noqa: F811
    assert "--every-layer is for --native" in refused("upcycle", tiny_base / "base", tmp_path / "out", "--every-layer")
    assert "is not a sparse model of this package" in refused("export", tiny_base / "base", tmp_path / "out")
    residual = tmp_path / "residual"
    assert run_here("upcycle", tiny_base / "base", residual, "--use-residual").exit_code == 0
    assert "no native architecture can express a residual MLP" in refused("export", residual, tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "moe-llava merge" in refused("export", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
