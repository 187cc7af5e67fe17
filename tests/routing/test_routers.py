"""Routers of every kind: found wherever a model declares them, checked for the rule of their weights, refused by name."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.output_capturing import OutputRecorder

from moe_llava import trace_routing
from moe_llava.routing.routers import find_routers
from moe_llava.routing.tokens import RoutingError
from moe_llava.routing.trace import CLOSE
from tests.conftest import tiny_dense, tiny_inputs
from tests.routing.tiny_models import TEXT_MODEL, tiny_sparse


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(RoutingError, match="LlavaForConditionalGeneration has no routers"):
        trace_routing(tiny_dense("llama"), tiny_inputs())
    with pytest.raises(RoutingError, match="found pixel_values in the inputs, but no input_ids"):
        trace_routing(tiny_sparse(), {"pixel_values": torch.zeros(1)})
    model = tiny_sparse()
    router = model.model.language_model.layers[1].mlp.router
    compute = router.forward
    router.forward = lambda *given: compute(*given)[::-1]
    with pytest.raises(RoutingError, match=r"layers.1.mlp.router \(Router\) returned shapes"):
        trace_routing(model, tiny_inputs())


LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
SIGMOIDS = {
    "deepseek-v3": lambda **given: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**TEXT_MODEL, **LATENT, "n_routed_experts": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4, **given}
        )
    ),
    "glm4-moe": lambda **given: Glm4MoeForCausalLM(Glm4MoeConfig(**{**TEXT_MODEL, "n_routed_experts": 8, **given})),
    "minimax-m2": lambda **given: MiniMaxM2ForCausalLM(MiniMaxM2Config(**{**TEXT_MODEL, "num_local_experts": 8, "rotary_dim": 8, **given})),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("spread", [0.2, 0.02])  # small logits, with which a sigmoid is nearly a softmax
@pytest.mark.parametrize("family", list(SIGMOIDS))
def test_routers_that_weigh_by_a_sigmoid(family, spread, experts_per_token, dtype):
    torch.manual_seed(0)
    model = SIGMOIDS[family](num_experts_per_tok=experts_per_token, initializer_range=spread).eval().to(dtype)
    logits = []
    for router in find_routers(model).values():
        router.register_forward_hook(lambda _, arguments, output: logits.append(output[0].detach()))
    trace = trace_routing(model, {"input_ids": torch.randint(3, 97, (2, 7))})
    for probs, layer in zip(trace.probs_LTE, logits, strict=False):
        scores = layer.view(-1, 8).float().sigmoid()
        torch.testing.assert_close(probs, scores / scores.sum(-1, keepdim=True))
    weights = trace.probs_LTE.gather(-1, trace.ids_LTK)
    found = trace.weights_LTK / trace.weights_LTK.sum(-1, keepdim=True)
    torch.testing.assert_close(found, weights / weights.sum(-1, keepdim=True), atol=2 * CLOSE[dtype], rtol=0)


def test_routers_with_another_rule_are_refused(monkeypatch):
    model = tiny_sparse()
    for router in find_routers(model).values():
        whole = router.forward
        monkeypatch.setattr(router, "forward", lambda *given, whole=whole: (lambda out: (out[0], out[1] ** 2, *out[2:]))(whole(*given)))
    with pytest.raises(RoutingError, match=r"neither by the softmax nor by the sigmoid of their logits, .*layers\.\d\.mlp.*Router\)"):
        trace_routing(model, tiny_inputs())


def test_a_router_without_an_opinion_shows_no_rule():
    """With the same logit for every expert, a sigmoid and a softmax give the same weights. The rule of our own routers is known."""
    for model, inputs in ((SIGMOIDS["glm4-moe"](), {"input_ids": torch.randint(3, 97, (2, 7))}), (tiny_sparse(), tiny_inputs())):
        for router in find_routers(model).values():
            nn.init.zeros_(router.weight)
        if isinstance(model, Glm4MoeForCausalLM):
            with pytest.raises(RoutingError, match=r"layers.1.mlp.gate \(\w+\) gives all experts the same logit"):
                trace_routing(model.eval(), inputs)
        else:
            assert (trace_routing(model, inputs).probs_LTE == 0.25).all()


@pytest.mark.parametrize("norm", [True, False])
def test_one_expert_for_each_token_by_softmax(norm):
    """With weight 1 or its probability; the check leaves the routers as they were."""
    text = {**TEXT_MODEL, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    made = [
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**text, num_experts=5, norm_topk_prob=norm)),
        tiny_sparse(num_experts_per_tok=1, norm_topk_prob=norm),
    ]
    for model in [*made, *([MixtralForCausalLM(MixtralConfig(**text, num_local_experts=5))] if norm else [])]:
        inputs = tiny_inputs() if hasattr(model.config, "vision_config") else {"input_ids": torch.randint(3, 97, (2, 7))}
        trace = trace_routing(model.eval(), inputs)
        expected = torch.ones_like(trace.weights_LTK) if norm else trace.probs_LTE.gather(-1, trace.ids_LTK)
        assert torch.allclose(trace.weights_LTK, expected)
        assert torch.equal(trace.ids_LTK[..., 0], trace.probs_LTE.argmax(-1))
        assert {router.top_k for router in find_routers(model).values()} == {1}


def test_a_router_that_can_only_choose_one_is_refused():
    model = tiny_sparse(num_experts_per_tok=1)
    for router in find_routers(model).values():
        router.forward = router.forward  # bound to the router itself, not to its twin
    with pytest.raises(RoutingError, match=r"layers.1.mlp.router \(Router\) chooses one expert, and does not choose two by `top_k`"):
        trace_routing(model, tiny_inputs())


@pytest.mark.parametrize(
    "recorders",
    [
        lambda router: [OutputRecorder(router, index=0)],
        lambda router: [OutputRecorder(nn.GRUCell), router],
        lambda router: router,
        lambda router: "mlp.gate",
        lambda router: ["mlp.gate", OutputRecorder(None, class_name="no.such.module")],
        lambda router: OutputRecorder(router, layer_name="mlp.gate"),
    ],
)
def test_recorders_come_in_every_form_that_transformers_takes(recorders, monkeypatch):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TEXT_MODEL, num_local_experts=5)).eval()
    inputs = {"input_ids": torch.randint(3, 97, (2, 7))}
    expected = trace_routing(model, inputs)
    declared = recorders(type(model.model.layers[0].mlp.gate))
    for part in (model, model.model):
        monkeypatch.setattr(part, "_can_record_outputs", {"router_logits": declared})
    found = trace_routing(model, inputs)
    assert found.layers == (0, 1, 2)
    assert torch.equal(found.probs_LTE, expected.probs_LTE)


@pytest.mark.parametrize("declared", [None, [], {}, {"router_logits": []}, {"router_logits": OutputRecorder(nn.GRUCell)}])
def test_a_model_without_recorders_has_no_routers(declared, monkeypatch):
    model = MixtralForCausalLM(MixtralConfig(**TEXT_MODEL, num_local_experts=5))
    for part in (model, model.model):
        monkeypatch.setattr(part, "_can_record_outputs", declared)
    with pytest.raises(RoutingError, match="MixtralForCausalLM has no routers"):
        trace_routing(model, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})


def test_routers_of_attention_are_refused():
    """JetMoe records two routers for each layer, as a list, and neither returns what a trace holds."""
    model = JetMoeForCausalLM(JetMoeConfig(**TEXT_MODEL, kv_channels=8, num_local_experts=4)).eval()
    with pytest.raises(RoutingError, match=r"layers.0.self_attention.* \(JetMoe\w+\) returned shapes"):
        trace_routing(model, {"input_ids": torch.randint(3, 97, (2, 7))})


def test_two_routers_in_one_layer_are_refused(monkeypatch):
    model = MixtralForCausalLM(MixtralConfig(**TEXT_MODEL, num_local_experts=5)).eval()
    mlp = model.model.layers[1].mlp
    mlp.second, block = copy.deepcopy(mlp.gate), type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: (hasattr(self, "second") and self.second(x), block(self, x))[1])
    with pytest.raises(RoutingError, match=r"layer 1 has several routers, .*mlp.gate \(.*\) and .*mlp.second"):
        trace_routing(model, {"input_ids": torch.randint(3, 97, (2, 7))})


def test_experts_come_in_order_of_probability():
    """Also from a router that lists them in another order."""
    model, inputs = tiny_sparse(), tiny_inputs()
    expected = trace_routing(model, inputs)
    router = model.model.language_model.layers[1].mlp.router
    compute = router.forward
    router.forward = lambda *given: tuple(value if place == 0 else value.flip(-1) for place, value in enumerate(compute(*given)))
    found = trace_routing(model, inputs)
    assert torch.equal(found.ids_LTK, expected.ids_LTK)
    assert torch.equal(found.weights_LTK[0], expected.weights_LTK[0])
