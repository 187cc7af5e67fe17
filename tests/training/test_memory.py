"""The predicted activations of a step, against what autograd saves for the backward pass."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig

from moe_llava import upcycle
from moe_llava.model import SparseModel
from moe_llava.training.labels import logits_at_labels
from moe_llava.training.memory import Batch, activations
from moe_llava.training.trainable import checkpoint_layers, choose_parameters

BATCH = Batch(rows=4, length=200, labelled=160)
TEXT = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 8}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def model_of(text, stage):
    """A model of a stage on the CPU, with its parameters chosen; its sparse layers are, or would be, 1, 3 and 5."""
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_id=499))
    model = upcycle(model, moe_layers=[1, 3, 5]) if stage == "stage3" else model
    choose_parameters(model, stage, [1, 3, 5])
    return model.train()


def saved_bytes(model):
    """Count the storages that a forward pass saves, without those of parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, 499, (BATCH.rows, BATCH.length), generator=torch.Generator().manual_seed(0))
    ids[:, 2:18] = 499
    labels = torch.full_like(ids, -100)
    labels[:, -BATCH.labelled // BATCH.rows :] = ids[:, -BATCH.labelled // BATCH.rows :]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(BATCH.rows, 3, 32, 32),
        "labels": labels,
    }
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs if isinstance(model, SparseModel) else inputs | logits_at_labels(labels))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3", "dense"])
@pytest.mark.parametrize(
    "text", [LlamaConfig(**TEXT), LlamaConfig(**TEXT, num_key_value_heads=4), PhiConfig(**TEXT)], ids=["llama", "grouped", "phi"]
)
def test_the_prediction_is_what_autograd_saves(text, stage, checkpointing):
    model = model_of(text, stage)
    if checkpointing:
        checkpoint_layers(model)
    assert activations(model, BATCH, checkpointing).saved == pytest.approx(saved_bytes(model), rel=0.25)


def test_what_the_peak_adds():
    """Two more rows of the vocabulary for each label; with checkpointing, a layer; in bf16, half the numbers and copies of the weights."""
    model = model_of(LlamaConfig(**TEXT), "stage2")
    whole, checkpointed = activations(model, BATCH), activations(model, BATCH, checkpointing=True)
    rows = 2 * BATCH.labelled * 500 * 4
    assert whole.peak == whole.saved + rows
    layer = (6 * 128 + 5 * 128 + 4 * 320) * BATCH.tokens * 4
    assert checkpointed.peak == checkpointed.saved + rows + layer
    assert whole.saved - checkpointed.saved == 6 * (layer - 128 * BATCH.tokens * 4)
    eager = activations(model, BATCH, eager=True)
    assert eager.saved - whole.saved == 6 * 8 * BATCH.rows * BATCH.length**2 * 4
