"""A trace has the routes of every token and nothing else, and does not change the model."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
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
from moe_llava.routing.statistics import RoutingStatistics
from moe_llava.routing.tokens import AUDIO, IMAGE, SPECIAL, TEXT, VIDEO, RoutingError, image_places, placeholder_kinds
from moe_llava.routing.trace import Trace, trace_records
from tests.conftest import IMAGE_TOKENS, tiny_dense, tiny_inputs
from tests.routing.tiny_models import TEXT_MODEL, tiny_sparse
from tests.training.conftest import tiny_base  # noqa: F401


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
        image_places(ids == 98, {"pixel_values": inputs["pixel_values"][:2]}, model)
    with pytest.raises(RoutingError, match="an image has 3 tokens, which are no square of patches"):
        image_places(torch.tensor([[True, True, True]]), {"pixel_values": inputs["pixel_values"][:1]}, model)


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


def tiny_qwen3_vl_moe():
    text = {**TEXT_MODEL, "num_experts": 5, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)).eval()


def media_inputs(ids, images=(), videos=()):
    """Return inputs as Qwen3-VL's processor makes them; `images` and `videos` are grids (frames, rows, columns) of patches."""
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == 90).int() + 2 * (ids == 91).int()}
    for name, grids, pixels in (("image", images, "pixel_values"), ("video", videos, "pixel_values_videos")):
        if grids:
            inputs[f"{name}_grid_thw"] = torch.tensor(grids)
            inputs[pixels] = torch.randn(sum(torch.tensor(grid).prod() for grid in grids), 3 * 2 * 4 * 4)
    return inputs


def test_qwen3_vl_moe():
    trace = trace_routing(tiny_qwen3_vl_moe(), media_inputs([5, 92, *[90] * 6, 93, 6, 7], images=[(1, 4, 6)]), max_new_tokens=3)
    assert trace.layers == (0, 1, 2)
    assert trace.places_T3[2:8].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert trace.kinds_T[:11].tolist() == [TEXT] * 2 + [IMAGE] * 6 + [TEXT] * 3
    assert int(trace.answer_T.sum()) == len(trace.token_ids_T) - 11


@pytest.mark.parametrize("max_new_tokens", [None, 3])
def test_a_video_is_no_text(max_new_tokens):
    """Two frames, each between start and end, and an image of its own; the video's patches have no place."""
    frame = [92, *[91] * 2, 93]
    ids = [5, *frame, *frame, 6, 92, *[90] * 4, 93, 7]
    inputs = media_inputs(ids, images=[(1, 4, 4)], videos=[(2, 4, 2)])
    trace = trace_routing(tiny_qwen3_vl_moe(), inputs, max_new_tokens=max_new_tokens)
    kinds = [{90: IMAGE, 91: VIDEO}.get(token, TEXT) for token in ids]
    assert trace.kinds_T[: len(ids)].tolist() == kinds
    assert trace.places_T3[trace.kinds_T == IMAGE].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert (trace.places_T3[trace.kinds_T != IMAGE] == -1).all()
    with pytest.raises(RoutingError, match="the trace has video tokens, but statistics compare image tokens with text"):
        RoutingStatistics().add(trace)


@pytest.mark.parametrize(
    ("fields", "inputs", "expected"),
    [
        ({"image_token_id": 7}, ["pixel_values"], {7: IMAGE}),
        ({"image_token_index": 7, "audio_token_index": 8}, ["pixel_values"], {7: IMAGE, 8: AUDIO}),
        ({"image_token_id": None, "image_token_index": 7, "video_token_id": 9}, [], {7: IMAGE, 9: VIDEO}),
        ({}, [], {}),
        ({}, ["pixel_values"], "found pixel_values in the inputs, but the model's configuration has no image_token_id"),
        ({"image_token_id": 7}, ["pixel_values_videos"], "found pixel_values_videos in the inputs, but .* no video_token_id"),
        ({"image_token_id": 7}, ["input_features"], "found input_features in the inputs, but .* no audio_token_id"),
    ],
)
def test_placeholders_are_those_of_the_configuration(fields, inputs, expected):
    config = SimpleNamespace(**fields)
    if isinstance(expected, dict):
        assert placeholder_kinds(config, ["input_ids", *inputs]) == expected
    else:
        with pytest.raises(RoutingError, match=expected):
            placeholder_kinds(config, ["input_ids", *inputs])


@pytest.mark.parametrize("with_mask", [True, False])
def test_an_answer_after_padding_is_refused(with_mask):
    """Padded on the left, a row gives the trace that it gives alone; on the right, generate() would answer the padding."""
    model = MixtralForCausalLM(MixtralConfig(**TEXT_MODEL, num_local_experts=5)).eval()
    row = torch.randint(3, 97, (5,), generator=torch.Generator().manual_seed(0))
    left, right = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
    left[0], right[0] = 5, 5
    left[1, 3:], right[1, :5] = row, row
    masks = [{"attention_mask": (ids != 0).long()} if with_mask else {} for ids in (left, right)]
    padded = trace_routing(model, {"input_ids": left, **masks[0]}, max_new_tokens=4).row(1)
    alone = trace_routing(model, {"input_ids": row[None]}, max_new_tokens=4)
    assert padded.token_ids_T.tolist() == alone.token_ids_T.tolist()
    assert torch.allclose(padded.probs_LTE, alone.probs_LTE, atol=1e-5)
    with pytest.raises(RoutingError, match=r"rows 1 of the inputs end with padding, .* pad on the left"):
        trace_routing(model, {"input_ids": right, **masks[1]}, max_new_tokens=4)
    # One forward pass does not mind: attention looks back only.
    assert trace_routing(model, {"input_ids": right, "attention_mask": (right != 0).long()}).row(1).token_ids_T.tolist() == row.tolist()


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
