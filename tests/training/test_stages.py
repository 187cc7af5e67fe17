"""Which parameters learn, and how many; and that the rest costs nothing but its forward pass."""

import shutil
import weakref

import pytest
import torch
from rich.console import Console

from moe_llava import upcycle
from moe_llava.training.adapters import attach, without_adapter
from moe_llava.training.recipe import Adapter, load_recipe
from moe_llava.training.run import train
from moe_llava.training.trainable import checkpoint_layers, choose_parameters
from moe_llava.training.trainer import StageTrainer
from tests.conftest import tiny_dense, tiny_inputs


def learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(model, *parts: str) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if any(part in name for part in parts))


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_what_learns_in_each_stage(family):
    dense = tiny_dense(family)
    layers = [0, 2]

    counts = choose_parameters(dense, "stage1", layers)
    assert learning(dense) == {name for name, _ in dense.named_parameters() if "multi_modal_projector" in name}
    assert counts.trained == {"projector": count(dense, "multi_modal_projector")}

    counts = choose_parameters(dense, "stage2", layers)
    assert learning(dense) == {name for name, _ in dense.named_parameters() if "vision_tower" not in name}
    assert counts.trained["language model"] == count(dense, "language_model", "lm_head")

    choose_parameters(dense, "dense", layers)
    assert learning(dense) == {name for name, _ in dense.named_parameters() if "layers.0.mlp" in name or "layers.2.mlp" in name} - {
        name for name, _ in dense.named_parameters() if "vision_tower" in name
    }

    sparse = upcycle(dense, use_residual=True)
    counts = choose_parameters(sparse, "stage3", layers)
    assert learning(sparse) == {
        name for name, _ in sparse.named_parameters() if ".experts." in name or ".router." in name or ".coefficient." in name
    }
    assert counts.trained == {"experts": count(sparse, ".experts."), "routers": count(sparse, ".router.", ".coefficient.")}
    assert counts.total == sum(parameter.numel() for parameter in sparse.parameters())
    assert "trains experts" in str(counts)


class Kept:
    """A tensor that a backward pass will need."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def kept_below(model, first: torch.nn.Module) -> int:
    """Tensors that a training step still keeps, when its forward pass is over, of what it computed before the module `first`."""
    kept, below = [], [True]
    first.register_forward_pre_hook(lambda *_: below.clear())

    def pack(tensor):
        box = Kept(tensor)
        if below:
            kept.append(weakref.ref(box))
        return box

    inputs = tiny_inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)).loss
    number = sum(box() is not None for box in kept)
    loss.backward()
    return number


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [None, ["experts", "routers"]], ids=["in full", "adapter"])
def test_nothing_is_kept_of_what_is_below_the_first_layer_that_learns(checkpointing, targets):
    """The tower, the projector, the embeddings, two layers."""
    model = whole = upcycle(tiny_dense("llama"), moe_layers=[2, 3]).train()
    if targets:
        model, _ = attach(whole, Adapter(targets, rank=2, alpha=4), "stage3", "base")
    else:
        choose_parameters(whole, "stage3", [2, 3])
    if checkpointing:
        checkpoint_layers(without_adapter(model))
    layers, tower = whole.model.language_model.layers, whole.model.vision_tower
    calls = {}
    for name, module in (("tower", tower.encoder.layers[0].mlp), ("layer 1", layers[1].mlp), ("layer 2", layers[2].mlp)):
        calls[name] = []
        module.register_forward_pre_hook(lambda _, arguments, name=name: calls[name].append(arguments[0].requires_grad))
    assert kept_below(model, layers[2]) == 0
    assert calls == {"tower": [False], "layer 1": [False], "layer 2": [False] * (1 + checkpointing)}  # only what learns is computed again
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == learning(model)
    whole.requires_grad_(True)
    assert kept_below(model, layers[2]) > 0


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_checkpointing_only_what_learns_changes_no_gradient(stage):
    found = []
    for checkpointing in (False, True):
        model = upcycle(tiny_dense("llama")) if stage == "stage3" else tiny_dense("llama")
        choose_parameters(model.train(), stage, [0, 2])
        calls = []
        model.model.vision_tower.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            checkpoint_layers(model)
        inputs = tiny_inputs()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert len(calls) == 1  # the tower learns in no stage
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
        assert found[-1].keys() == learning(model)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_keeps_moments_of_what_learns_and_computes_the_rest_once(write_recipe, tiny_base, tmp_path, monkeypatch):
    trainers, calls = [], {"tower": 0, "layer 1": 0, "layer 2": 0}
    begin = StageTrainer.begin

    def watch(trainer, step):
        begin(trainer, step)
        trainers.append(trainer)
        model = trainer.model.model

        def count_calls(name):
            calls[name] += 1

        for name, module in (
            ("tower", model.vision_tower.encoder.layers[0].mlp),
            ("layer 1", model.language_model.layers[1].mlp),
            ("layer 2", model.language_model.layers[2].mlp),
        ):
            module.register_forward_pre_hook(lambda *_, name=name: count_calls(name))

    monkeypatch.setattr(StageTrainer, "begin", watch)
    settings = {"optimisation__max_steps": 2, "optimisation__gradient_checkpointing": True, "moe__moe_layers": "second_half"}
    file = write_recipe(**{f"stage3__{key}": value for key, value in settings.items()})
    shutil.copytree(tiny_base / "base", tmp_path / "run" / "stage2")
    train(load_recipe(file), [3], resume=False, console=Console(quiet=True))
    (trainer,) = trainers
    assert calls == {"tower": 2, "layer 1": 2, "layer 2": 4}
    optimizer = trainer.optimizer.optimizer
    learns = {parameter for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == learns == set(optimizer.state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters() if not parameter.requires_grad)
