"""docs/customising.md: a language model family that the package does not know, added as the document says."""

import itertools
import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel, LlavaForConditionalGeneration

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from moe_llava.model import ffn
from moe_llava.model.moe import GatedExperts
from tests.conftest import REPOSITORY, tiny_config, tiny_dense, tiny_inputs


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyMlp(nn.Module):
    def __init__(self, width, ffn_width):
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, ffn_width, bias=False), nn.Linear(width, ffn_width, bias=False)
        self.w2 = nn.Linear(ffn_width, width, bias=False)
        self.act_fn = nn.Tanh()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class ToyModel(LlamaModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = ToyMlp(config.hidden_size, config.intermediate_size)
        self.post_init()


AutoConfig.register("toy", ToyConfig)
AutoModel.register(ToyConfig, ToyModel)


@pytest.fixture
def dense():
    config = tiny_config("llama")
    text = {key: value for key, value in config.text_config.to_dict().items() if key != "model_type"}
    config.text_config = ToyConfig(**text)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def documented_row(monkeypatch):
    """Runs the document's Python, and takes the row away again."""
    monkeypatch.setattr(ffn, "FFN_FORMS", list(ffn.FFN_FORMS))
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "customising.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "FFN_FORMS" in block)
    exec(code, {})


def test_without_a_row_the_error_says_what_was_found(dense):
    with pytest.raises(ValueError, match=r"describes ToyMlp, whose parameters are: w1\.weight, w2\.weight, w3\.weight"):
        upcycle(dense)


def test_a_row_with_an_activation_that_is_not_there_does_not_fit(dense, documented_row):
    for layer in dense.model.language_model.layers:
        del layer.mlp.act_fn
    with pytest.raises(ValueError, match="no row of FFN_FORMS"):
        upcycle(dense)


def test_the_same_parameters_used_differently_are_refused(monkeypatch):
    """Gemma3n is such a family: some of its layers leave out most of the gate."""
    dense = tiny_dense("llama")
    mlp = type(dense.model.language_model.layers[0].mlp)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: plain(self, x) + 0.1 * self.down_proj(self.up_proj(x)))
    with pytest.raises(ValueError, match=r"computes something else \(.*% off\): it needs a row of its own"):
        upcycle(dense)


CHANGES = {
    "a clamp of the output": lambda self, x, y: y.clamp(-20, 20),
    "a clamp of large values only": lambda self, x, y: y.clamp(max=500),
    "a clamp of the gate": lambda self, x, y: self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x)),
    "a threshold for small values": lambda self, x, y: y.where(y.abs() > 0.02, 0),
    "the sign of the input": lambda self, x, y: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).abs()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_ffn_does_beside_its_products_is_found_at_some_scale(change, dtype, monkeypatch):
    dense = tiny_dense("llama").to(dtype)
    mlp = type(dense.model.language_model.layers[0].mlp)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: CHANGES[change](self, x, plain(self, x)))
    with pytest.raises(ValueError, match=r"layer 0: LlamaMLP has .* computes something else \(expert 0, inputs up to .*% off\)"):
        upcycle(dense)


def test_every_expert_of_every_layer_is_compared(monkeypatch):
    """Experts whose third, in one layer, does not compute what it holds."""
    dense = tiny_dense("llama")
    plain = GatedExperts.each

    def each(self):
        of = plain(self)
        self.layer = next(numbers) // 4  # asked once for each expert
        return lambda expert: {name: 2 * weight if (self.layer, expert) == (1, 2) else weight for name, weight in of(expert).items()}

    numbers = itertools.count()
    monkeypatch.setattr(GatedExperts, "each", each)
    with pytest.raises(ValueError, match=r"layer 2: LlamaMLP .* \(expert 2, inputs up to 0\.1: "):
        upcycle(dense)


def test_a_refused_model_is_left_as_it_was(monkeypatch):
    dense = tiny_dense("llama").train()
    mlp = type(dense.model.language_model.layers[0].mlp)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: plain(self, x).clamp(-1, 1))
    with pytest.raises(ValueError, match="computes something else"):
        upcycle(dense)
    assert all(module.training for module in dense.modules())


def test_float16_is_compared_as_far_as_it_goes():
    """The largest inputs exceed its range, in the FFN and in the experts."""
    dense = tiny_dense("llama").half()
    assert not dense.model.language_model.layers[0].mlp(torch.full((1, 32), 2000.0).half()).isfinite().all()
    upcycle(dense)


@torch.no_grad()
def test_with_the_documented_row_it_becomes_sparse(dense, documented_row, tmp_path):
    inputs = tiny_inputs()
    expected = dense(**inputs).logits
    sparse = upcycle(dense, num_experts=3)
    assert torch.equal(sparse.sparse_mlps()[0].experts.down_proj[2], dense.model.language_model.layers[0].mlp.w2.weight)
    torch.testing.assert_close(sparse(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    sparse.save_pretrained(tmp_path)
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
