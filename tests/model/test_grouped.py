"""The experts' products over sorted rows, against a sum over tokens and choices written out."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from moe_llava.model.grouped import combine, dispatch, grouped_linear, sort_by_expert
from moe_llava.model.moe import GatedExperts, PlainExperts, choose_backend
from tests.conftest import tiny_dense
from tests.model.test_equivalences import shuffled_sparse
from tests.model.test_moe import config

WIDTH, FFN_WIDTH, EXPERTS = 6, 10, 4
both_forms = pytest.mark.parametrize("form", [GatedExperts, PlainExperts])


def some_experts(form, dtype=torch.float64):
    torch.manual_seed(0)
    experts = form(config(num_experts=EXPERTS), WIDTH, FFN_WIDTH, ACT2FN["silu"]).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def some_tokens(top_k, dtype=torch.float64, leave_out=2):
    """Tokens of which none chooses expert `leave_out`."""
    logits = torch.randn(9, EXPERTS, dtype=dtype).index_fill(1, torch.tensor(leave_out), -1e9)
    weights, ids = logits.softmax(-1).topk(top_k)
    return torch.randn(9, WIDTH, dtype=dtype).requires_grad_(), ids, weights.requires_grad_()


def written_out(experts, x, ids, weights):
    def one(expert, row):
        if isinstance(experts, GatedExperts):
            gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
            return experts.down_proj[expert] @ (F.silu(gate) * up)
        hidden = F.silu(experts.up_proj[expert] @ row + experts.up_proj_bias[expert])
        return experts.down_proj[expert] @ hidden + experts.down_proj_bias[expert]

    return torch.stack([sum(w * one(e, row) for e, w in zip(i, ws, strict=True)) for row, i, ws in zip(x, ids, weights, strict=True)])


@both_forms
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_values_and_gradients(form, top_k):
    experts = some_experts(form)
    x, ids, weights = some_tokens(top_k)
    leaves = [x, weights, *experts.parameters()]
    got, expected = experts(x, ids, weights), written_out(experts, x, ids, weights)
    torch.testing.assert_close(got, expected)
    with torch.no_grad():  # one expert after another
        torch.testing.assert_close(experts(x, ids, weights), expected)
    upstream = torch.randn_like(got)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


@both_forms
def test_frozen_experts_hand_the_gradient_on(form):
    experts = some_experts(form).requires_grad_(False)
    x, ids, weights = some_tokens(2)
    experts(x, ids, weights).sum().backward()
    (expected,) = torch.autograd.grad(written_out(experts, x, ids, weights).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    assert all(parameter.grad is None for parameter in experts.parameters())


@both_forms
def test_autocast(form):
    """As F.linear: products in bfloat16, of weights in float32, whose gradients are float32."""
    experts = some_experts(form, torch.float32)
    x, ids, weights = some_tokens(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        products = grouped_linear({"up": experts.down_proj.transpose(1, 2)}, [9, 0, 0, 0], x, "up")
        got = experts(x, ids, weights)
        with torch.no_grad():
            one_after_another = experts(x, ids, weights)
    assert products.dtype == torch.bfloat16
    for found in (got, one_after_another):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, written_out(experts, x, ids, weights), atol=0.05, rtol=0.05)
    got.sum().backward()
    assert experts.down_proj.grad.dtype == torch.float32


@both_forms
def test_experts_that_are_elsewhere_add_nothing(form):
    """Where experts are shared out over processes, those of others have the index `num_experts`, and the weight 0."""
    experts = some_experts(form)
    x, ids, weights = some_tokens(2)
    away = ids == 1
    here = experts(x, ids.masked_fill(away, EXPERTS), weights.masked_fill(away, 0.0))
    torch.testing.assert_close(here, written_out(experts, x, ids, weights.masked_fill(away, 0.0)))
    with torch.no_grad():
        torch.testing.assert_close(experts(x, ids.masked_fill(away, EXPERTS), weights.masked_fill(away, 0.0)), here)
    for gradient in torch.autograd.grad(here.sum(), [x, *experts.parameters()]):
        assert gradient.isfinite().all()


def test_there_is_no_second_derivative():
    experts = some_experts(GatedExperts)
    x, ids, weights = some_tokens(2)
    with pytest.raises(RuntimeError, match="loop over experts has no second derivative"):
        torch.autograd.grad(experts(x, ids, weights).sum(), x, create_graph=True)


@both_forms
def test_no_tokens(form):
    experts, (x, ids, weights) = some_experts(form), (given[:0] for given in some_tokens(2))
    assert experts(x, ids, weights).shape == (0, WIDTH)
    with torch.no_grad():
        assert experts(x, ids, weights).shape == (0, WIDTH)


def test_there_and_back_again():
    ids = torch.tensor([[3, 1], [1, 0], [3, 0]])
    order = sort_by_expert(ids, 4)
    assert order.counts == [2, 2, 0, 2]
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(dispatch(x, order), x[[1, 2, 0, 1, 0, 2]])
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert torch.equal(combine(dispatch(x, order), weights, order), x * weights.sum(-1, keepdim=True))


def test_the_backend_is_chosen_unless_it_is_said():
    sparse = shuffled_sparse("llama")
    (layer, *_) = sparse.sparse_mlps().values()
    assert layer.experts.config._experts_implementation == "auto"
    for backend in ("grouped_mm", "auto"):
        sparse.set_experts_implementation(backend)
        assert layer.experts.config._experts_implementation == backend
    assert tiny_dense("llama").config._experts_implementation != "auto"
    with pytest.raises(ValueError, match="best_mm"):
        sparse.set_experts_implementation("best_mm")


@torch.no_grad()
def test_compiled_in_one_graph():
    """Other backends than the loop, which would break it."""
    (layer, *_) = shuffled_sparse("llama").sparse_mlps().values()
    x = torch.randn(1, 20, layer.experts.hidden_dim)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)


def test_the_choice():
    experts = some_experts(GatedExperts)
    few, many = torch.zeros(4, 2, dtype=torch.long), torch.zeros(40_000, 2, dtype=torch.long)
    assert choose_backend(torch.zeros(4, WIDTH), few, experts) == "eager"
    on_device = torch.zeros(4, WIDTH, device="meta")
    assert choose_backend(on_device, many, experts) == "grouped_mm"
    assert choose_backend(on_device, few, experts) == "grouped_mm"
    with torch.no_grad():
        assert choose_backend(on_device, few, experts) == "batched_mm"
        assert choose_backend(on_device, many, experts) == "grouped_mm"
        with torch.device("meta"):
            wide = GatedExperts(config(num_experts=EXPERTS), 1024, 2816, ACT2FN["silu"])  # 35 MB each: copies of 8 would take 280 MB
        assert choose_backend(on_device, few[:1, :1], wide) == "batched_mm"
        assert choose_backend(on_device, few, wide) == "grouped_mm"
