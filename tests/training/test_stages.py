"""Which parameters learn, and how many."""

import pytest

from moe_llava import upcycle
from moe_llava.training.stages import choose_parameters
from tests.conftest import tiny_dense


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
    assert counts.learning == {"projector": count(dense, "multi_modal_projector")}

    counts = choose_parameters(dense, "stage2", layers)
    assert learning(dense) == {name for name, _ in dense.named_parameters() if "vision_tower" not in name}
    assert counts.learning["language model"] == count(dense, "language_model", "lm_head")

    choose_parameters(dense, "dense", layers)
    assert learning(dense) == {name for name, _ in dense.named_parameters() if "layers.0.mlp" in name or "layers.2.mlp" in name} - {
        name for name, _ in dense.named_parameters() if "vision_tower" in name
    }

    sparse = upcycle(dense, use_residual=True)
    counts = choose_parameters(sparse, "stage3", layers)
    assert learning(sparse) == {
        name for name, _ in sparse.named_parameters() if ".experts." in name or ".router." in name or ".coefficient." in name
    }
    assert counts.learning == {"experts": count(sparse, ".experts."), "routers": count(sparse, ".router.", ".coefficient.")}
    assert counts.total == sum(parameter.numel() for parameter in sparse.parameters())
    assert "learns experts" in str(counts)
