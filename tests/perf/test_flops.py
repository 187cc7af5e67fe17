"""The FLOPs that are computed from configurations are those that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_llava import upcycle
from moe_llava.perf.layers import DENSE, OURS, dense_layer, our_layer, random_weights
from moe_llava.perf.options import LayerSize
from moe_llava.training.adapters import attach
from moe_llava.training.budget import count, stage_cost
from moe_llava.training.recipe import Adapter
from moe_llava.training.trainable import checkpoint_layers
from tests.conftest import tiny_dense

ROWS, LENGTH = 2, 11
MOE_LAYERS = [0, 2]


def build(family, kind, moe_layers=MOE_LAYERS):
    dense = tiny_dense(family)
    model = dense if kind == "dense" else upcycle(dense, num_experts=4, num_experts_per_tok=2, moe_layers=moe_layers)
    model.set_attn_implementation("eager")  # torch has no formula for the other kernels on a CPU
    if kind == "sparse":
        model.set_experts_implementation("eager")
    return model


def counted(model, backward, below=False):
    """Return the FLOPs per token of the language model, with logits at all positions. `below`: the gradient reaches the embeddings, as it
    does where the projector is trained."""
    ids = torch.randint(3, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(below)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / (ROWS * LENGTH)


def vectors(model):
    """Count the active biases of attention, FFN and experts: torch does not count their additions, `count` counts two FLOPs each."""
    found = 0
    for name, parameter in model.model.language_model.named_parameters():
        if name.endswith("bias") and "norm" not in name:
            found += parameter.numel() // (2 if ".experts." in name else 1)  # two of four experts are active
    return found


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
def test_forward_pass(family, kind):
    """Each token attends to all of its row: eager attention computes masked scores too."""
    model = build(family, kind)
    assert counted(model, backward=False) == count(model, context=LENGTH).flops - 2 * vectors(model)
    assert (vectors(model) > 0) == (family == "phi")


STAGES = [("dense", "stage1"), ("dense", "stage2"), ("dense", "dense"), ("sparse", "stage3")]


@pytest.mark.parametrize("moe_layers", [[0, 2], [2, 3]])
@pytest.mark.parametrize(("kind", "stage"), STAGES)
def test_training(kind, stage, moe_layers):
    """Gradients reach the layers from the first trained one on: in stage III, not the layers below the first sparse one."""
    model = build("llama", kind, moe_layers)
    cost = stage_cost(model, stage, moe_layers, context=LENGTH)
    assert counted(model, True, below=stage in ("stage1", "stage2")) == cost.flops


@pytest.mark.parametrize(("kind", "stage"), [("dense", "dense"), ("sparse", "stage3")])
def test_training_with_biases(kind, stage):
    """What biases add is counted, but not measured: see `vectors`."""
    model = build("phi", kind)
    cost = stage_cost(model, stage, MOE_LAYERS, context=LENGTH)
    assert cost.flops - 6 * vectors(model) <= counted(model, True) <= cost.flops


@pytest.mark.parametrize("moe_layers", [[0, 2], [2, 3]])
@pytest.mark.parametrize(("kind", "stage"), STAGES)
def test_gradient_checkpointing_computes_layers_again(kind, stage, moe_layers):
    """The head is not computed again, and in a dense layer the last product: nothing needs it. The computed numbers have the latter."""
    model = build("llama", kind, moe_layers).train()
    cost = stage_cost(model, stage, moe_layers, checkpointing=True, context=LENGTH)
    checkpoint_layers(model)
    last, reached = 2 * 32 * 48, range(0 if stage in ("stage1", "stage2") else moe_layers[0], 4)
    dense_layers = [layer for layer in reached if kind == "dense" or layer not in moe_layers]
    assert counted(model, True, below=stage in ("stage1", "stage2")) == cost.flops - last * len(dense_layers)


@pytest.mark.parametrize(("kind", "targets"), [("dense", ["attention"]), ("dense", ["FFN"]), ("sparse", ["attention"])])
def test_adapters(kind, targets):
    """With a rank of 1, the products of the adapter, which are not counted, are few."""
    model, adapter = build("llama", kind), Adapter(targets, rank=1)
    cost = stage_cost(model, "stage3", MOE_LAYERS, adapter, context=LENGTH)
    adapted, _ = attach(model, adapter, "stage3", "")
    assert counted(adapted.get_base_model(), True) == pytest.approx(cost.flops, rel=0.1)


def test_layers():
    size = LayerSize(16, 32, 48)
    x_1TD, device = torch.randn(1, size.tokens, size.width), torch.device("cpu")
    layers = {DENSE: dense_layer(size, torch.float32, device), OURS: our_layer(size, random_weights(size, torch.float32, device), "eager")}
    router = 2 * size.tokens * size.width * size.experts
    for name, layer in layers.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x_1TD)
        assert counter.get_total_flops() == size.flops + (router if name == OURS else 0)
