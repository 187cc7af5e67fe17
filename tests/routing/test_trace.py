"""A trace says what the routers did, of every token and nothing else, and leaves the model as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from moe_llava import trace_routing, upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.common.errors import DataError
from moe_llava.data.store import load_records
from moe_llava.routing.tokens import IMAGE, SPECIAL, TEXT, RoutingError, image_places
from moe_llava.routing.trace import Trace, trace_records
from tests.conftest import IMAGE_TOKENS, tiny_dense, tiny_inputs
from tests.training.conftest import tiny_base  # noqa: F401


def tiny_sparse(**settings):
    return upcycle(tiny_dense("llama"), **{"moe_layers": [1, 3], "num_experts": 4, "num_experts_per_tok": 2, **settings}).eval()


def padded_inputs():
    """Two rows, of which the first begins with three padding tokens and the second ends with an end token."""
    inputs = tiny_inputs(image_token_id=98)
    inputs["input_ids"] = torch.cat([torch.zeros(2, 3, dtype=torch.long), inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.zeros(2, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
    inputs["input_ids"][1, :3], inputs["attention_mask"][1, :3] = 5, 1
    inputs["input_ids"][1, -1] = 2
    return inputs


def test_a_forward_pass_is_what_the_model_returns():
    model, inputs = tiny_sparse(capacity_factor=0.5), padded_inputs()
    trace = trace_routing(model, inputs)
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    real_T = inputs["attention_mask"].flatten().bool()
    assert trace.layers == (1, 3)
    assert trace.probs_LTE.shape == (2, int(real_T.sum()), 4)
    for layer in range(2):
        probs_TE = outputs.router_logits[layer][real_T].softmax(-1)
        assert torch.allclose(trace.probs_LTE[layer], probs_TE)
        assert torch.equal(trace.ids_LTK[layer], probs_TE.topk(2).indices)
        assert torch.equal(trace.dropped_LTK[layer], outputs.router_drops[layer][real_T])
    assert trace.dropped_LTK.any()
    assert torch.equal(trace.weights_LTK == 0, trace.dropped_LTK)


def test_kinds_and_places():
    inputs = padded_inputs()
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    inputs["labels"][:, -4:] = inputs["input_ids"][:, -4:]
    first, second = trace_routing(tiny_sparse(), inputs).split()
    assert first.kinds_T.tolist() == [TEXT] + [IMAGE] * IMAGE_TOKENS + [TEXT] * 8
    assert second.kinds_T.tolist() == [TEXT] * 4 + [IMAGE] * IMAGE_TOKENS + [TEXT] * 7 + [SPECIAL]
    assert first.answer_T.tolist() == [False] * 9 + [True] * 4
    assert first.places_T3[1:5].tolist() == second.places_T3[4:8].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert (first.places_T3[5:] == -1).all()
    assert first.token_ids_T.tolist() == inputs["input_ids"][0, 3:].tolist()


def test_several_images_and_a_class_token():
    model = upcycle(tiny_dense("llama"), moe_layers=[1])
    model.config.vision_feature_select_strategy = "full"
    images, tokens = 3, IMAGE_TOKENS + 1
    ids = torch.full((2, 1 + 2 * tokens), 7)
    ids[0, 1:] = 98
    ids[1, 1 : 1 + tokens] = 98
    inputs = {"input_ids": ids, "pixel_values": torch.randn(images, 3, 16, 16)}
    first, second = trace_routing(model, inputs).split()
    assert first.places_T3[first.kinds_T == IMAGE][:, 0].tolist() == [0] * tokens + [1] * tokens
    assert second.places_T3[second.kinds_T == IMAGE].tolist() == [[0, -1, -1], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    with pytest.raises(RoutingError, match="found 15 image tokens, but 2 images in pixel_values"):
        image_places(ids == 98, {"pixel_values": inputs["pixel_values"][:2]}, model.config)
    with pytest.raises(RoutingError, match="an image has 3 tokens, which are no square of patches"):
        image_places(torch.tensor([[True, True, True]]), {"pixel_values": inputs["pixel_values"][:1]}, model.config)


def test_a_generation_is_a_forward_pass_over_what_was_generated():
    model, inputs = tiny_sparse(), padded_inputs()
    trace = trace_routing(model, inputs, max_new_tokens=6)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[98])
    for row, (part, ids) in enumerate(zip(trace.split(), generated, strict=True)):
        prompt = inputs["attention_mask"][row].bool()
        answer = ids[inputs["input_ids"].shape[1] :].tolist()
        answer = answer[: answer.index(2) + 1] if 2 in answer else answer
        read = answer[:-1] if len(answer) == 6 else answer
        assert part.token_ids_T[part.answer_T].tolist() == read
        whole = {
            "input_ids": torch.cat([inputs["input_ids"][row][prompt], torch.tensor(read)])[None],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        again = trace_routing(model, whole)
        assert torch.allclose(part.probs_LTE, again.probs_LTE, atol=1e-5)
        assert torch.equal(part.places_T3, again.places_T3)


def test_rows_that_end_early_are_cut():
    model, inputs = tiny_sparse(), tiny_inputs()
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=5, do_sample=False, suppress_tokens=[98])[:, length:]
    end = next(token for token in free[0, :3].tolist() if token not in free[1].tolist())
    model.generation_config.eos_token_id = end
    first, second = trace_routing(model, inputs, max_new_tokens=5).split()
    assert int(first.answer_T.sum()) == free[0].tolist().index(end) + 1
    assert int(second.answer_T.sum()) == 4


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_come_off_again(monkeypatch):
    model, inputs = tiny_sparse(), tiny_inputs()
    model(**inputs, output_router_logits=True)  # transformers puts hooks of its own there, once
    before = hooks(model)
    trace_routing(model, inputs)
    assert hooks(model) == before
    monkeypatch.setattr(type(model.lm_head), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace_routing(model, inputs)
    assert hooks(model) == before


def test_an_adapter_changes_nothing_about_tracing():
    """PEFT keeps two routers for each layer, of which one computes; before training, both are the same."""
    model, inputs = tiny_sparse(), tiny_inputs()
    expected = trace_routing(model, inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["router"]))
    found = trace_routing(adapted, inputs)
    assert found.layers == expected.layers
    assert torch.equal(found.probs_LTE, expected.probs_LTE)


def test_saved_and_loaded(tmp_path):
    inputs = padded_inputs()
    trace = trace_routing(tiny_sparse(), inputs)
    trace.save(tmp_path / "trace.safetensors", source="record 3")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert (loaded.layers, loaded.pieces) == (trace.layers, None)
    for name in ("probs_LTE", "ids_LTK", "weights_LTK", "dropped_LTK", "token_ids_T", "rows_T", "kinds_T", "answer_T", "places_T3"):
        assert torch.equal(getattr(loaded, name), getattr(trace, name))
    (tmp_path / "other").write_text("{}")
    with pytest.raises(RoutingError, match="other is no trace"):
        Trace.load(tmp_path / "other")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(RoutingError, match="weights is no trace: its format is None"):
        Trace.load(tmp_path / "weights")


TEXT_MODEL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixtralForCausalLM(MixtralConfig(**TEXT_MODEL, num_local_experts=5)),
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT_MODEL, num_experts=5, mlp_only_layers=[1])),
    ],
    ids=["mixtral", "qwen3-moe"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_sparse_language_models(make, dtype):
    torch.manual_seed(0)
    model = make().eval().to(dtype)
    inputs = {"input_ids": torch.randint(3, 97, (2, 7))}
    trace = trace_routing(model, inputs, max_new_tokens=4)
    routers = 2 if isinstance(model, Qwen3MoeForCausalLM) else 3
    assert trace.layers == ((0, 2) if routers == 2 else (0, 1, 2))
    assert set(trace.kinds_T.tolist()) <= {TEXT, SPECIAL}
    whole = trace.split()[0]
    outputs = model(input_ids=whole.token_ids_T[None], output_router_logits=True)
    for layer, logits_TE in enumerate(outputs.router_logits):
        assert torch.allclose(whole.probs_LTE[layer], logits_TE.float().softmax(-1), atol=1e-5 if dtype is torch.float32 else 0.02)


def test_qwen3_vl_moe():
    text = {**TEXT_MODEL, "num_experts": 5, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)).eval()
    patches = 4 * 6
    ids = torch.tensor([[5, 92, *[90] * (patches // 4), 93, 6, 7]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 90).int(),
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    trace = trace_routing(model, inputs, max_new_tokens=3)
    assert trace.layers == (0, 1, 2)
    assert trace.places_T3[2:8].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert trace.kinds_T[:11].tolist() == [TEXT] * 2 + [IMAGE] * 6 + [TEXT] * 3
    assert int(trace.answer_T.sum()) == len(trace.token_ids_T) - 11


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


def test_routers_with_another_rule_than_softmax_are_refused():
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**TEXT_MODEL, **heads, **groups, "num_key_value_heads": 4, "head_dim": 4})).eval()
    with pytest.raises(RoutingError, match="do not weigh experts by the softmax"):
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


@pytest.fixture
def sparse_digits(tiny_base):  # noqa: F811
    dense, processor = load_checkpoint(tiny_base / "base", dtype=torch.float32)
    return upcycle(dense, moe_layers=[1, 3]), processor


def test_a_data_set_is_traced_batch_by_batch(tiny_base, sparse_digits):  # noqa: F811
    model, processor = sparse_digits
    records = load_records(tiny_base / "data" / "test.json", tiny_base / "data" / "images")[:5]
    batches = list(trace_records(model, processor, records, batch_size=2))
    assert [len(batch.split()) for batch in batches] == [2, 2, 1]
    traces = [trace for batch in batches for trace in batch.split()]
    alone = [next(trace_records(model, processor, records[index : index + 1], batch_size=1)) for index in range(5)]
    for record, one, other in zip(records, traces, alone, strict=True):
        assert torch.allclose(one.probs_LTE, other.probs_LTE, atol=1e-5)
        answer = [piece for piece, is_answer in zip(one.pieces, one.answer_T.tolist(), strict=True) if is_answer]
        assert answer == [*record.turns[0][1].split(), "</s>"]
        assert one.kinds_T[-1] == SPECIAL
        assert int((one.kinds_T == IMAGE).sum()) == 36


def test_a_record_that_cannot_be_read_is_named(tiny_base, sparse_digits, tmp_path):  # noqa: F811
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "bad.json").write_text(
        '[{"image": "a.png", "conversations": [{"from": "human", "value": "<image> ?"}, {"from": "gpt", "value": "1"}]}]'
    )
    with pytest.raises(DataError, match=r"record 0 of .*bad.json names the image .*a.png, which cannot be decoded"):
        list(trace_records(*sparse_digits, load_records(tmp_path / "bad.json", tmp_path), batch_size=2))
