"""Compare with outputs of the original implementation, recorded in float32."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from moe_llava import MoeLlavaForConditionalGeneration, load_published, upcycle

SPARSE = ["phi", "stablelm", "phi_residual"]
LAYERS = [0, 2]


@pytest.fixture
def load(golden):
    """name -> (model, recorded)"""

    def load(name):
        folder = golden / "checkpoints" / name
        return load_published(folder, golden / "checkpoints" / "towers"), load_file(folder / "golden.safetensors")

    return load


def inputs_of(model, recorded, rows):
    """Return the recorded sequences as inputs: -200 becomes as many placeholders as an image has features; padding is on the right."""
    ids, labels = [], []
    for row in rows:
        real = recorded["attention_mask"][row].bool()
        repeats = torch.where(recorded["input_ids"][row][real] == -200, recorded["projected_image_features"].shape[1], 1)
        ids.append(recorded["input_ids"][row][real].masked_fill(repeats > 1, model.config.image_token_id).repeat_interleave(repeats))
        labels.append(recorded["labels"][row][real].masked_fill(repeats > 1, -100).repeat_interleave(repeats))
    pad = {"batch_first": True, "padding_value": 318}
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, **pad)
    lengths = torch.tensor([len(row) for row in ids])
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "pixel_values": recorded["pixel_values"][list(rows)],
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected.reshape(found.shape), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("row", [0, 1])
@torch.no_grad()
def test_a_sparse_checkpoint_computes_the_recorded_outputs(load, name, row):
    model, recorded = load(name)
    assert type(model) is MoeLlavaForConditionalGeneration
    outputs = model(**inputs_of(model, recorded, [row]), output_router_logits=True, output_hidden_states=True)
    close(outputs.logits[0], recorded[f"seq{row}.logits"], 1e-4)
    close(outputs.loss, recorded[f"seq{row}.loss"], 1e-5)
    close(outputs.image_hidden_states, recorded["projected_image_features"][row], 1e-5)
    close(outputs.aux_loss, sum(recorded[f"seq{row}.layer{layer}.l_aux"] for layer in LAYERS), 1e-5)
    for layer, logits in zip(LAYERS, outputs.router_logits, strict=True):
        close(logits, recorded[f"seq{row}.layer{layer}.router_logits"], 1e-5)
        chosen = logits.softmax(-1).topk(2).indices
        assert torch.equal(chosen, recorded[f"seq{row}.layer{layer}.topk_ids"].long())
    if row == 0:
        close(torch.cat(outputs.hidden_states), recorded["seq0.hidden_states"], 1e-4)


@pytest.mark.parametrize("name", SPARSE)
@torch.no_grad()
def test_each_sparse_layer_alone(load, name):
    model, recorded = load(name)
    for layer, mlp in model.sparse_mlps().items():
        x = recorded[f"seq0.layer{layer}.moe_in"]
        close(mlp(x[None])[0], recorded[f"seq0.layer{layer}.moe_out"], 1e-5)
        logits, weights, ids, dropped = mlp.router(x)
        close(logits, recorded[f"seq0.layer{layer}.router_logits"], 1e-5)
        close(weights, recorded[f"seq0.layer{layer}.topk_weights"], 1e-5)
        assert torch.equal(ids, recorded[f"seq0.layer{layer}.topk_ids"].long())
        assert not dropped.any()


@pytest.mark.parametrize("name", [*SPARSE, "phi_stage2"])
@torch.no_grad()
def test_the_same_greedy_tokens(load, name):
    model, recorded = load(name)
    inputs = inputs_of(model, recorded, [0])
    del inputs["labels"]
    found = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert found.tolist() == recorded["seq0.greedy_ids"].tolist()


@pytest.mark.parametrize("name", [*SPARSE, "phi_stage2"])
@torch.no_grad()
def test_a_padded_batch_equals_its_sequences_alone(load, name):
    model, recorded = load(name)
    logits = model(**inputs_of(model, recorded, [0, 1])).logits
    for row in (0, 1):
        expected = recorded[f"seq{row}.logits"]
        close(logits[row, : len(expected)], expected, 1e-4)


@pytest.mark.parametrize("row", [0, 1])
@torch.no_grad()
def test_a_dense_stage_2_checkpoint(load, row):
    model, recorded = load("phi_stage2")
    assert type(model) is LlavaForConditionalGeneration
    outputs = model(**inputs_of(model, recorded, [row]))
    close(outputs.logits[0], recorded[f"seq{row}.logits"], 1e-4)
    close(outputs.loss, recorded[f"seq{row}.loss"], 1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
@torch.no_grad()
def test_upcycling_it(load, top_k):
    """Use the recorded routers. The original does not renormalise the weight of a single expert."""
    dense, recorded = load("phi_stage2")
    model = upcycle(dense, num_experts=4, num_experts_per_tok=top_k, norm_topk_prob=top_k > 1)
    for layer, mlp in model.sparse_mlps().items():
        mlp.router.weight.copy_(recorded[f"upcycled.layer{layer}.wg"])
    outputs = model(**inputs_of(model, recorded, [0]), output_router_logits=True)
    close(outputs.logits[0], recorded[f"upcycled_top{top_k}.seq0.logits"], 1e-4)
    close(outputs.aux_loss, sum(recorded[f"upcycled_top{top_k}.seq0.layer{layer}.l_aux"] for layer in LAYERS), 1e-5)
    for layer, logits in zip(LAYERS, outputs.router_logits, strict=True):
        close(logits, recorded[f"upcycled_top{top_k}.seq0.layer{layer}.router_logits"], 1e-5)


@torch.no_grad()
def test_a_stage_1_projector(load):
    model, recorded = load("phi_stage1")
    close(model.model.multi_modal_projector(recorded["image_features"]), recorded["projected_image_features"], 1e-5)
    found = model.model.get_image_features(
        pixel_values=recorded["pixel_values"], vision_feature_layer=-2, vision_feature_select_strategy="default"
    )
    close(torch.stack(list(found.pooler_output)), recorded["projected_image_features"], 1e-5)
