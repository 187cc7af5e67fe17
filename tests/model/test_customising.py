"""docs/customising.md: a language model family that the package does not know, added as the document says."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel, LlavaForConditionalGeneration

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from moe_llava.model import ffn
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
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "customising.md").read_text(), re.DOTALL)
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
    with pytest.raises(ValueError, match=r"computes something else \(.*% off\): it needs a form of its own"):
        upcycle(dense)


@torch.no_grad()
def test_with_the_documented_row_it_becomes_sparse(dense, documented_row, tmp_path):
    inputs = tiny_inputs()
    expected = dense(**inputs).logits
    sparse = upcycle(dense, num_experts=3)
    assert torch.equal(sparse.model.sparse_mlps()[0].experts.down_proj[2], dense.model.language_model.layers[0].mlp.w2.weight)
    torch.testing.assert_close(sparse(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    sparse.save_pretrained(tmp_path)
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
