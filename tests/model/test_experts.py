"""Experts that are parts of an FFN, shared experts, and experts that differ from the start."""

import copy

import pytest
import torch

from moe_llava import upcycle
from moe_llava.model.ffn import as_expert
from moe_llava.model.options import MoeOptions
from moe_llava.model.upcycling import DROPPED, evolve_experts
from tests.conftest import FAMILIES, tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of
from tests.vlm import tiny_vlm, vlm_inputs

CUTS = [(2, 0), (3, 0), (1, 1), (2, 1), (4, 3), (2, 2)]  # granularity, shared experts


def differ(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("granularity", "shared"), CUTS)
@torch.no_grad()
def test_cut_and_shared_experts_compute_the_dense_model(family, granularity, shared):
    dense, inputs = tiny_dense(family), tiny_inputs()
    with torch.random.fork_rng():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    expected = dense(**inputs).logits
    sparse = upcycle(dense, num_experts=3, num_experts_per_tok=2, granularity=granularity, num_shared_experts=shared)
    assert differ(expected, sparse(**inputs).logits) < 2e-6
    mlp = sparse.sparse_mlps()[0]
    assert mlp.experts.num_experts == mlp.router.num_experts == 3 * granularity
    assert mlp.router.top_k == 2 * granularity
    assert mlp.experts.intermediate_dim == 48 // granularity
    if shared:
        assert as_expert(mlp.shared_experts)["down_proj"].shape == (32, shared * 48 // granularity)


@pytest.mark.parametrize("routing", ["modality_split", "smoes"])
@torch.no_grad()
def test_they_go_with_routing_by_modality(routing):
    dense, inputs = tiny_vlm("qwen3_vl"), vlm_inputs("qwen3_vl")
    real, expected = inputs["attention_mask"].bool(), dense(**inputs).logits
    sparse = upcycle(dense, num_experts=4, granularity=2, num_shared_experts=1, routing=routing)
    assert differ(expected[real], sparse(**inputs).logits[real]) < 2e-6


@torch.no_grad()
def test_the_parts_of_an_ffn_are_chosen_together_and_add_up_to_it():
    sparse = upcycle(tiny_dense("phi"), num_experts=3, granularity=2)
    mlp = sparse.sparse_mlps()[0]
    assert torch.equal(mlp.router.weight[0::2], mlp.router.weight[1::2])
    _, weights_TK, ids_TK, _ = mlp.router(torch.randn(50, 32))
    copies_TK = (ids_TK // 2).sort(dim=-1).values
    assert torch.equal(copies_TK[:, 0::2], copies_TK[:, 1::2])
    assert torch.allclose(weights_TK.sum(-1), torch.ones(50))


def test_the_balance_loss_starts_like_that_of_whole_experts():
    inputs = tiny_inputs(text=40)
    found = [upcycle(tiny_dense("llama"), granularity=g)(**inputs, output_router_logits=True).aux_loss.item() for g in (1, 2, 4)]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_agree_between_backends(backend):
    inputs = tiny_inputs()
    sparse = upcycle(tiny_dense("llama"), granularity=2, num_shared_experts=1, expert_start="noise")
    expected = torch.autograd.grad(sparse(**inputs, labels=labels_of(inputs)).loss, list(sparse.parameters()), allow_unused=True)
    sparse.set_experts_implementation(backend)
    found = torch.autograd.grad(sparse(**inputs, labels=labels_of(inputs)).loss, list(sparse.parameters()), allow_unused=True)
    for (name, _), a, b in zip(sparse.named_parameters(), expected, found, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_they_are_saved_and_loaded(tmp_path):
    sparse, inputs = upcycle(tiny_dense("phi"), granularity=2, num_shared_experts=1, router_bias_rate=0.1), tiny_inputs()
    sparse.sparse_mlps()[0].router.load_bias.bias[1] = 3.0
    expected = sparse(**inputs).logits
    sparse.save_pretrained(tmp_path)
    loaded = type(sparse).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    assert loaded.sparse_mlps()[0].router.load_bias.bias.tolist()[:3] == [0, 3, 0]
    half = type(sparse).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.sparse_mlps()[0].router.load_bias.bias.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
@torch.no_grad()
def test_drop_upcycling_draws_half_of_the_columns_with_the_statistics_of_the_old_ones(family):
    dense = tiny_dense(family)
    with torch.random.fork_rng():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    plain, dropped = (upcycle(dense, expert_start=start, seed=5).sparse_mlps()[0] for start in ("copy", "drop"))
    assert torch.equal(plain.router.weight, dropped.router.weight)
    width = plain.experts.intermediate_dim
    changed = []
    for expert in range(plain.experts.num_experts):
        by_name = {}
        for name, stack in dropped.experts.named_parameters():
            same = stack[expert] == plain.experts.get_parameter(name)[expert]
            if name == "down_proj_bias":
                assert same.all()
            elif name == "down_proj":
                by_name[name] = (~same).any(0)
            else:
                by_name |= {f"{name} {part}": (~block.view(width, -1)).any(1) for part, block in enumerate(same.unflatten(0, (-1, width)))}
        columns = next(iter(by_name.values()))
        assert all(torch.equal(columns, other) for other in by_name.values())
        assert columns.sum() == round(DROPPED * width)
        changed.append(columns)
        old, new = (mlp.experts.down_proj[expert][:, columns] for mlp in (plain, dropped))
        assert new.std().item() == pytest.approx(old.std().item(), rel=0.15)
        assert abs(new.mean() - old.mean()) < 0.1 * old.std()
    assert not torch.equal(changed[0], changed[1])


@torch.no_grad()
def test_experts_from_several_models():
    dense, origins = tiny_dense("llama"), [tiny_dense("llama", seed=seed) for seed in (3, 4, 5)]
    sparse = upcycle(dense, num_experts=3, experts_from=origins, granularity=2)
    for index, mlp in sparse.sparse_mlps().items():
        for copied, origin in enumerate(origins):
            whole = as_expert(origin.model.language_model.layers[index].mlp)["down_proj"]
            assert torch.equal(torch.cat(list(mlp.experts.down_proj[2 * copied : 2 * copied + 2]), dim=-1), 2 * whole)
    assert torch.equal(sparse.lm_head.weight, dense.lm_head.weight)
    # A token that uses one expert gets what the model of this expert computes in this layer.
    alone = upcycle(dense, num_experts=3, num_experts_per_tok=1, experts_from=origins)
    x_TD, mlp = torch.randn(20, 32), alone.sparse_mlps()[2]
    ids_T = mlp.router(x_TD)[2][:, 0]
    for token, x_D in enumerate(x_TD):
        expected = origins[ids_T[token]].model.language_model.layers[2].mlp(x_D)
        torch.testing.assert_close(mlp(x_D.view(1, 1, -1)).flatten(), expected)


@pytest.mark.parametrize(("dense_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_experts_from_models_of_another_dtype(dense_dtype, dtype):
    origin = tiny_dense("llama", seed=3).to(dtype)
    sparse = upcycle(tiny_dense("llama").to(dense_dtype), num_experts=2, experts_from=[origin, origin])
    for index, mlp in sparse.sparse_mlps().items():
        whole = origin.model.language_model.layers[index].mlp.down_proj.weight
        assert torch.equal(mlp.experts.down_proj[1], whole.to(dense_dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: [tiny_dense("llama")] * 2, "experts_from has 2 models, but each gives one expert, and num_experts is 3"),
        (
            lambda: [tiny_dense("llama")] * 2 + [tiny_dense("llama", layers=2)],
            r"experts_from\[2\] is of another architecture: it has nothing as ",
        ),
        (lambda: [tiny_dense("llama")] * 2 + [tiny_dense("phi")], r"experts_from\[2\] is of another architecture: it has "),
    ],
)
def test_models_that_cannot_give_experts(change, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_dense("llama"), num_experts=3, experts_from=change())


def test_another_activation_is_refused():
    other = tiny_dense("llama")
    other.config.text_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"experts_from\[0\] has another hidden_act than the model itself"):
        upcycle(tiny_dense("llama"), num_experts=2, experts_from=[copy.deepcopy(other), other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": 0}, "granularity is 0, but must be at least 1"),
        ({"num_shared_experts": 2}, "num_shared_experts is 2, but must be at most granularity=1: shared experts begin as parts of one FFN"),
        ({"num_shared_experts": 1, "use_residual": True}, "use_residual is True, but there are shared experts, too"),
        ({"balance_over": "batch"}, "balance_over is 'batch', but must be one of step, process, sequence"),
        ({"router_bias_rate": -1.0}, "router_bias_rate is -1.0, but must be at least 0"),
    ],
)
def test_options_out_of_bounds(options, message):
    assert message in MoeOptions(**options).moe_problems()[0]


def test_an_ffn_that_cannot_be_cut():
    with pytest.raises(ValueError, match="granularity is 5, but must divide the width of the FFN, 48"):
        upcycle(tiny_dense("llama"), granularity=5)


def test_parts_do_not_evolve():
    with pytest.raises(ValueError, match="granularity is 2, but expert evolution starts from equal experts, not from parts"):
        evolve_experts(upcycle(tiny_dense("llama"), num_experts=2, num_experts_per_tok=1, granularity=2), [tiny_inputs()])
