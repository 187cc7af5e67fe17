"""Numbers worked out by hand, and in another way."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from moe_llava.routing import statistics
from moe_llava.routing.plots import plot_expert_load, plot_modality, plot_pathways, plot_router
from moe_llava.routing.statistics import RoutingStatistics, TokenSample, mutual_information, top_pathways
from moe_llava.routing.tokens import IMAGE, TEXT, RoutingError
from moe_llava.routing.trace import Trace


def make_trace(probs_LTE, kinds, top_k=1, rows=None):
    probs_LTE = torch.as_tensor(probs_LTE, dtype=torch.float32)
    weights_LTK, ids_LTK = probs_LTE.topk(top_k)
    tokens = len(kinds)
    return Trace(
        probs_LTE=probs_LTE,
        ids_LTK=ids_LTK,
        weights_LTK=weights_LTK,
        dropped_LTK=torch.zeros_like(ids_LTK, dtype=torch.bool),
        token_ids_T=torch.arange(tokens),
        rows_T=torch.tensor(rows if rows is not None else [0] * tokens),
        kinds_T=torch.tensor(kinds, dtype=torch.uint8),
        answer_T=torch.zeros(tokens, dtype=torch.bool),
        places_T3=torch.full((tokens, 3), -1),
        layers=tuple(range(0, 2 * len(probs_LTE), 2)),
    )


def random_trace(tokens=400, layers=3, experts=4, top_k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(layers, tokens, experts, generator=generator)).softmax(-1)
    return make_trace(probs, torch.randint(0, 3, (tokens,), generator=generator).tolist(), top_k)


def summed(*traces, groups=None):
    statistics = RoutingStatistics()
    for trace in traces:
        statistics.add(trace, groups)
    return statistics.summary()


def test_by_hand():
    sure, doubtful, torn = [0.0, 1.0, 0.0, 0.0], [0.5, 0.3, 0.2, 0.0], [0.5, 0.25, 0.25, 0.0]
    found = summed(make_trace([[sure, sure, doubtful, torn]], [IMAGE, IMAGE, TEXT, TEXT]))
    assert found["tokens"] == {"image": 2, "text": 2}
    assert found["image"] == [[0, 2, 0, 0]]
    assert found["text"] == [[2, 0, 0, 0]]
    assert found["load"] == [[0.5, 0.5, 0.0, 0.0]]
    assert found["image_share"] == [[0.0, 1.0, None, None]]
    assert found["dead"] == {"0": [2, 3]}
    assert found["entropy"]["image"] == [0.0]
    doubt = -(0.5 * math.log2(0.5) + 0.3 * math.log2(0.3) + 0.2 * math.log2(0.2))
    assert found["entropy"]["text"] == [pytest.approx((doubt + 1.5) / 2)]
    assert found["margin"] == {"image": [1.0], "text": [pytest.approx(0.225)]}
    assert found["modality_information"] == [pytest.approx(1.0)]  # the expert determines the modality: one bit
    json.dumps(found)


def test_information_as_scikit_learn_has_it():
    trace = random_trace()
    found = summed(trace)
    is_image = np.repeat((trace.kinds_T == IMAGE).numpy(), 2)
    for layer in range(3):
        expected = mutual_info_score(is_image, trace.ids_LTK[layer].flatten().numpy()) / math.log(2)
        assert found["modality_information"][layer] == pytest.approx(expected, abs=1e-9)
        for other in range(3):
            first = [trace.ids_LTK[index, :, 0].numpy() for index in (layer, other)]
            assert found["agreement"][layer][other] == pytest.approx(normalized_mutual_info_score(*first), abs=1e-9)


def test_agreement_does_not_mind_how_experts_are_numbered():
    first = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1])]
    found = summed(make_trace(torch.stack([first, first[:, [2, 0, 3, 1]], torch.eye(4)[torch.zeros(6, dtype=torch.long)]]), [TEXT] * 6))
    assert found["agreement"] == [[1.0, pytest.approx(1.0), 0.0], [pytest.approx(1.0), 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_groups_are_distinguished_by_their_text():
    one, two = [1.0, 0.0], [0.0, 1.0]
    trace = make_trace([[two, one, two, two]], [IMAGE, TEXT, IMAGE, TEXT], rows=[0, 0, 1, 1])
    found = summed(trace, groups=["count", "colour"])
    assert found["groups"] == {"count": [[1, 0]], "colour": [[0, 1]]}
    assert found["group_information"] == [pytest.approx(1.0)]
    assert summed(trace)["group_information"] is None
    assert mutual_information(torch.tensor([[5, 5], [5, 5]])) == 0.0


def test_text_alone():
    found = summed(make_trace([[[1.0, 0.0], [1.0, 0.0]]], [TEXT, TEXT]))
    assert found["entropy"] == {"image": None, "text": [0.0]}
    assert found["image_share"] == [[0.0, None]]
    assert found["pathways"]["image"]["paths"] == []
    for plot in (plot_expert_load, plot_modality, plot_pathways, plot_router):
        plot(found).savefig(io.BytesIO())


def test_parts_are_the_whole():
    trace = random_trace()
    parts = [replace(trace, rows_T=(torch.arange(400) >= 150).long()).split()[index] for index in (0, 1)]
    whole, together = summed(trace), summed(*parts)
    for name in ("image", "text", "dead", "load"):
        assert whole[name] == together[name]
    assert np.allclose(whole["agreement"], together["agreement"])
    for name in ("entropy", "margin"):
        assert whole[name]["text"] == pytest.approx(together[name]["text"])


def test_dropped_assignments_are_counted_apart():
    trace = random_trace(tokens=50)
    trace.dropped_LTK[1, :5, 0] = True
    found = summed(trace)
    assert [sum(layer) for layer in found["dropped"]] == [0, 5, 0]
    assert [sum(layer) for layer in found["load"]] == [pytest.approx(1)] * 3


def test_traces_of_different_models_are_not_mixed():
    statistics = RoutingStatistics()
    with pytest.raises(RoutingError, match="no tokens"):
        statistics.summary()
    statistics.add(random_trace(layers=3))
    with pytest.raises(RoutingError, match=r"layers \(0, 2\) cannot be added to those of layers \(0, 2, 4\)"):
        statistics.add(random_trace(layers=2))


def test_pathways_are_found_again_under_noise():
    """Three pathways through 12 layers, every token with noise of its own: exact ones are nearly all different."""
    layers, experts, tokens = 12, 4, 3000
    generator = np.random.default_rng(0)
    truth = generator.integers(0, experts, (3, layers))
    which = generator.choice(3, tokens, p=[0.6, 0.3, 0.1])
    logits = 1.5 * np.eye(experts)[truth[which]] + generator.normal(size=(tokens, layers, experts))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    exact = np.unique(probs.argmax(-1), axis=0)
    assert len(exact) > 2500
    found = top_pathways(probs.reshape(tokens, -1), layers, experts)
    assert [path["experts"] for path in found["paths"][:2]] == truth[:2].tolist()
    assert found["paths"][0]["share"] > 0.1
    assert len(found["paths"]) == statistics.MOST
    assert found["explained"] == pytest.approx(PCA(statistics.COMPONENTS).fit(probs.reshape(tokens, -1)).explained_variance_ratio_.sum())


def test_few_numbers_lose_nothing():
    probs = torch.rand(500, 6, generator=torch.Generator().manual_seed(0)).numpy().astype(float)
    found = top_pathways(probs, layers=2, experts=3)
    paths, counts = np.unique(probs.reshape(500, 2, 3).argmax(-1), axis=0, return_counts=True)
    assert [(tuple(path["experts"]), round(path["share"] * 500)) for path in found["paths"]] == sorted(
        ((tuple(path), count) for path, count in zip(paths.tolist(), counts.tolist(), strict=True)), key=lambda pair: (-pair[1], pair[0])
    )
    assert found["explained"] == pytest.approx(1.0)
    assert top_pathways(np.empty((0, 6)), 2, 3) == {"paths": [], "explained": None, "tokens": 0}


def test_the_sample_is_uniform_and_of_constant_size():
    sample = TokenSample(size=1000)
    for batch in range(50):
        sample.add(torch.full((1, 200, 1), batch / 64), torch.zeros(200, dtype=torch.long))
    assert len(sample.probabilities(0)) == 1000
    per_batch = np.bincount((sample.probabilities(0)[:, 0] * 64).astype(int), minlength=50)
    assert per_batch.min() > 5
    assert per_batch.max() < 40
