"""Experts as linear layers: equal to stacks, quantised by bitsandbytes, saved and loaded."""

import json
import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_model
from moe_llava.checkpoints.separate import separate_experts, stack_experts
from moe_llava.common.errors import CheckpointError
from moe_llava.training.adapters import quantisation_config, weight_bytes
from tests.conftest import tiny_dense, tiny_inputs, wide_dense

KINDS = {"nf4": Linear4bit, "int8": Linear8bitLt}


def shuffled(dense):
    """A sparse model whose experts differ."""
    sparse = upcycle(dense, num_experts=3, moe_layers=[1, 3]).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mlp in sparse.sparse_mlps().values():
            for parameter in mlp.experts.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return sparse


@pytest.fixture(scope="module", params=["llama", "phi"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    shuffled(wide_dense(request.param)).save_pretrained(place)
    return place


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def quantised(folder, kind):
    config = quantisation_config(folder, kind, torch.float32)
    return load_model(folder, separate_experts=True, quantization_config=config, device_map="cpu")


def experts_of(model):
    return [mlp.experts for mlp in model.sparse_mlps().values()]


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_linear_layers_compute_what_stacks_compute(family):
    stacked, separate = shuffled(tiny_dense(family)), shuffled(tiny_dense(family))
    separate_experts(separate)
    assert torch.equal(logits(separate), logits(stacked))
    inputs = tiny_inputs()
    for model in (stacked, separate):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in separate.named_parameters():
        matrix = re.fullmatch(r"(.+\.experts\.\w+)\.(\d+)\.(weight|bias)", name)
        if matrix:
            expected = stacked.get_parameter(matrix[1] + ("_bias" if matrix[3] == "bias" else "")).grad[int(matrix[2])]
        else:
            expected = stacked.get_parameter(name).grad
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # of an expert without tokens
        if expected is not None:
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)
    stack_experts(separate)
    found, expected = separate.state_dict(), stacked.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_config_json_has_the_field_only_where_experts_are_separate(folder, tmp_path):
    assert "separate_experts" not in (folder / "config.json").read_text()
    separate = load_model(folder, separate_experts=True)
    separate.save_pretrained(tmp_path / "separate")
    assert json.loads((tmp_path / "separate" / "config.json").read_text())["separate_experts"] is True
    again = load_model(tmp_path / "separate")
    assert all(experts.separated for experts in experts_of(again))
    stack_experts(again)
    again.save_pretrained(tmp_path / "stacked")
    assert "separate_experts" not in (tmp_path / "stacked" / "config.json").read_text()


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "100KB"}], ids=["file", "shards"])
def test_stacks_load_as_linear_layers(folder, how, tmp_path):
    stacked = load_model(folder)
    stacked.generation_config.max_length = 77
    stacked.save_pretrained(tmp_path / "stacked", **how)
    separate = load_model(tmp_path / "stacked", separate_experts=True)
    assert all(experts.separated for experts in experts_of(separate))
    assert torch.equal(logits(separate), logits(stacked))
    assert separate.generation_config.max_length == 77
    assert separate.name_or_path == str(tmp_path / "stacked")


def test_backends_of_stacks_are_refused(folder):
    separate = load_model(folder, separate_experts=True)
    with pytest.raises(ValueError, match="experts_implementation 'grouped_mm' computes stacked experts, but separate_experts is true"):
        separate.set_experts_implementation("grouped_mm")
    expected = logits(separate)
    separate.set_experts_implementation("eager")
    assert torch.equal(logits(separate), expected)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 4 / 16 + 4 / 64 / 2), ("int8", 0.5 + 4 / 64 / 2)])
def test_bytes_of_quantised_experts(folder, kind, most):
    """Beside the weights, nf4 has a scale of 4 bytes per 64 weights, and int8 one per row, which has 64 weights here."""
    plain, model = load_model(folder), quantised(folder, kind)
    kept = 0
    for experts in experts_of(model):
        layers = [layer for layer in experts.modules() if isinstance(layer, torch.nn.Linear)]
        assert {type(layer) for layer in layers} == {KINDS[kind]}
        kept += sum(weight_bytes(layer) - 200 for layer in layers)  # a table of 16 values, the names of settings, and the bias
    whole = sum(parameter.numel() for experts in experts_of(plain) for parameter in experts.parameters() if parameter.dim() == 3)
    assert kept / (2 * whole) <= most + 0.05
    errors = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < errors < {"nf4": 0.5, "int8": 0.05}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_experts_are_saved(folder, kind, tmp_path):
    """The same bits before and after, with the Auto classes too, and if the model was used before it was saved."""
    model = quantised(folder, kind)
    model.save_pretrained(tmp_path / "fresh")
    expected = logits(model)
    model.save_pretrained(tmp_path / "used")
    assert torch.equal(logits(model), expected)
    for name in ("fresh", "used"):
        for load in (load_model, AutoModelForImageTextToText.from_pretrained):
            assert torch.equal(logits(load(tmp_path / name)), expected)


def test_widths_that_four_bits_cannot_compute(tmp_path):
    upcycle(tiny_dense("llama")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"4 bits needs layers from multiples of 64 .*q_proj is of 32 to \d+: use 8 bits"):
        quantised(tmp_path, "nf4")
