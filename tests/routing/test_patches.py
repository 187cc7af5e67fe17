"""Routers outside the language model: the patches that each expert takes, in traces, statistics and the picture of the load."""

import json

import numpy as np
import pytest
import torch

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.routing.plots import plot_expert_load
from moe_llava.routing.routers import RoutingError
from moe_llava.routing.statistics import RoutingStatistics
from moe_llava.routing.trace import Trace, trace_routing
from tests.conftest import run_here, tiny_dense, tiny_inputs
from tests.training.conftest import tiny_base  # noqa: F401

PARTS = ["language_model", "projector", "vision_tower"]


@pytest.fixture(scope="module")
def sparse():
    model = upcycle(tiny_dense("llama"), num_experts=4, moe_in=PARTS)
    with torch.no_grad():
        for mlp in model.vision_mlps().values():
            mlp.router.weight.mul_(100)
    return model


def expected(sparse, inputs):
    with torch.no_grad():
        choices = sparse(**inputs, output_router_logits=True).vision_router_choices
    return {label: ids_TK.flatten().bincount(minlength=4).tolist() for label, ids_TK in zip(sparse.vision_mlps(), choices, strict=True)}


@pytest.mark.parametrize("max_new_tokens", [None, 4])
def test_a_trace_counts_the_patches_of_each_expert(sparse, max_new_tokens):
    """Once for each image, also if an answer is generated; tokens are traced in the language model alone, as without."""
    trace = trace_routing(sparse, tiny_inputs(), max_new_tokens=max_new_tokens)
    assert trace.layers == (0, 2)
    assert trace.patches == expected(sparse, tiny_inputs())
    assert {label: sum(counts) for label, counts in trace.patches.items()} == {"tower 0": 2 * 5 * 2, "projector": 2 * 4 * 2}
    assert not any(mlp.router._forward_hooks for mlp in sparse.vision_mlps().values())


def test_saved_loaded_and_cut(sparse, tmp_path):
    trace = trace_routing(sparse, tiny_inputs())
    trace.save(tmp_path / "trace.safetensors")
    assert Trace.load(tmp_path / "trace.safetensors").patches == trace.patches
    assert [row.patches for row in trace.split()] == [{}, {}]  # which row a patch is of is not known
    (alone,) = trace_routing(sparse, tiny_inputs(batch=1)).split()
    assert alone.patches == expected(sparse, tiny_inputs(batch=1))


def test_statistics_and_the_picture_of_the_load(sparse):
    statistics = RoutingStatistics()
    for seed in (1, 2):
        statistics.add(trace_routing(sparse, tiny_inputs(seed=seed)))
    summary = statistics.summary()
    both = [expected(sparse, tiny_inputs(seed=seed)) for seed in (1, 2)]
    assert summary["patches"] == {label: np.add(both[0][label], both[1][label]).tolist() for label in both[0]}
    everything, image, text = plot_expert_load(summary).axes
    assert [label.get_text() for label in everything.get_yticklabels()] == ["layer 0", "layer 2", "tower 0", "projector"]
    for axis in (everything, image):
        widths_LE = np.array([bar.get_width() for bar in axis.patches]).reshape(4, 4).T
        for row, counts in zip(widths_LE[2:], summary["patches"].values(), strict=True):
            assert np.allclose(row, np.array(counts) / sum(counts))
    assert not np.array([bar.get_width() for bar in text.patches]).reshape(4, 4).T[2:].any()


def test_routers_of_patches_alone_cannot_be_traced():
    with pytest.raises(RoutingError, match=r"has routers of patches alone, in tower 0, projector: none of tokens"):
        trace_routing(upcycle(tiny_dense("llama"), moe_in=["vision_tower", "projector"]), tiny_inputs())


def test_the_command(tiny_base, tmp_path):  # noqa: F811
    dense, processor = load_checkpoint(tiny_base / "base")
    upcycle(dense, moe_in=PARTS).save_pretrained(tmp_path / "sparse")
    processor.save_pretrained(tmp_path / "sparse")
    data = tiny_base / "data"
    done = run_here(
        "routes", tmp_path / "sparse", "--data", data / "test.json", "--images", data / "images", "--out", tmp_path / "out", "--limit", "2"
    )
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert {label: sum(counts) for label, counts in summary["patches"].items()} == {"tower 0": 2 * 37 * 2, "projector": 2 * 36 * 2}
