"""The predicted activations of a step, against what autograd saves for the backward pass."""

import dataclasses
import weakref

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig, SiglipVisionConfig

from moe_llava import MoeOptions, upcycle
from moe_llava.model import SparseModel
from moe_llava.model.losses import logits_at_labels
from moe_llava.model.places import vision_ffns
from moe_llava.training.budget import patches_of_image
from moe_llava.training.distil import divergence, to_events
from moe_llava.training.memory import Batch, activations
from moe_llava.training.trainable import checkpoint_layers, choose_parameters
from tests.model.test_moe_in import COVERED
from tests.vlm import tiny_vlm

BATCH = Batch(rows=4, length=200, labelled=160)
TEXT = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 8}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def model_of(text, stage):
    """A model of a stage on the CPU, with its parameters chosen; its sparse layers are, or would be, 1, 3 and 5."""
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_id=499))
    model = upcycle(model, moe_layers=[1, 3, 5]) if stage == "stage3" else model
    choose_parameters(model, stage, [1, 3, 5])
    return model.train()


def saved_bytes(model, batch=BATCH):
    """Count the storages that a forward pass saves, without those of parameters, and of what its result does not need."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.add(self)

    vision = model.config.vision_config
    ids = torch.randint(0, 499, (batch.rows, batch.length), generator=torch.Generator().manual_seed(0))
    ids[:, 2 : 2 + patches_of_image(vision)] = 499
    labels = torch.full_like(ids, -100)
    labels[:, -batch.labelled // batch.rows :] = ids[:, -batch.labelled // batch.rows :]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(batch.rows, 3, vision.image_size, vision.image_size),
        "labels": labels,
    }
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda held: held.tensor):
        loss = model(**inputs if isinstance(model, SparseModel) else inputs | logits_at_labels(labels)).loss
    found = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in saved}
    assert loss.requires_grad  # it holds the graph
    return sum(size for address, size in found.items() if address not in weights)


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


def llava(text, vision, **settings):
    """A dense LLaVA that uses all layers of its tower."""
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=499, vision_feature_layer=-1, **settings)
    return LlavaForConditionalGeneration(config)


TOWERS = {"clip": (CLIPVisionConfig, "default"), "siglip": (SiglipVisionConfig, "full")}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["stage3", "dense"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_whose_ffns_are_trained(tower, stage, checkpointing):
    """Its activations are most of all here. The layers below the first sparse one keep nothing. With checkpointing, little is left beside
    the norm after the tower and the projector, which are not modelled."""
    config_class, strategy = TOWERS[tower]
    vision = VISION | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "image_size": 64}
    text = LlamaConfig(**TEXT | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2})
    model = llava(text, config_class(**vision), vision_feature_select_strategy=strategy)
    options = MoeOptions(moe_in=["vision_tower"], moe_layers="second_half")
    ffns = list(vision_ffns(model, options).values())
    model = upcycle(model, options) if stage == "stage3" else model
    choose_parameters(model, stage, [], ffns)
    batch = Batch(rows=4, length=70, labelled=16, patches=4 * patches_of_image(model.config.vision_config))
    if checkpointing:
        checkpoint_layers(model)
    found = activations(model.train(), batch, checkpointing).saved
    without = activations(model, dataclasses.replace(batch, patches=0), checkpointing).saved
    assert found > 3 * without
    assert found == pytest.approx(saved_bytes(model, batch), rel=0.3 if checkpointing else 0.05)


def test_eager_attention_of_a_trained_tower():
    """Each head keeps a number for each patch of an image: in the layers above the first sparse one."""
    model = upcycle(llava(LlamaConfig(**TEXT), CLIPVisionConfig(**VISION)), moe_in=["vision_tower"])
    choose_parameters(model, "stage3", [], list(model.vision_names.values()))
    batch = Batch(4, 200, 160, patches=4 * 16)
    more = [activations(model, each, eager=True).saved - activations(model, each).saved for each in (batch, Batch(4, 200, 160))]
    assert more[0] - more[1] == 2 * 16 * 4 * 16 * 4


def test_what_a_teacher_adds():
    model = model_of(LlamaConfig(**TEXT), "stage3")
    taught, plain = (activations(model, Batch(4, 200, 160, taught=taught)) for taught in (True, False))
    assert taught.peak - plain.peak == 3 * 160 * 500 * 4


@pytest.mark.parametrize(("top_k", "rows"), [(None, 2), (8, 2)])
def test_the_divergence_keeps_rows_of_the_vocabulary(top_k, rows):
    """Live, log q and p, and log p is there besides; cached, log q, and q without the cached tokens."""
    generator = torch.Generator().manual_seed(0)
    logits_NV, log_p_NV = torch.randn(2, 20, 500, generator=generator)
    log_p_NV = log_p_NV.log_softmax(-1)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        divergence(logits_NV.requires_grad_(), {"log_probs": log_p_NV} if top_k is None else to_events(log_p_NV, top_k), 2.0)
    assert sum(tensor.shape == (20, 500) and tensor.is_floating_point() for tensor in saved.values()) == rows


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


@pytest.mark.parametrize("family", [family for family, parts in COVERED.items() if "vision_tower" in parts])
def test_the_towers_of_all_families_are_counted(family):
    model = upcycle(tiny_vlm(family), moe_in=["vision_tower"])
    choose_parameters(model, "stage3", [], list(model.vision_names.values()))
    patches = patches_of_image(model.config.vision_config)
    without, some, more = (activations(model, Batch(1, 64, 16, number)).saved for number in (0, patches, 2 * patches))
    assert some > without
    assert more - some == some - without
