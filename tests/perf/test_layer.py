"""The layers that are compared: they compute the same, and as much."""

import re

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from moe_llava.perf import layer, layers
from moe_llava.perf.layers import BACKENDS, DENSE, OURS, dense_layer, errors, layer_variants, our_layer, random_weights
from moe_llava.perf.options import FORWARD, PHASES, BenchError, LayerSize, parse_size
from moe_llava.perf.rivals import DEEPSPEED, MIXTRAL

CPU = torch.device("cpu")
SIZE = LayerSize(tokens=24, width=16, ffn_width=32)
SPARSE = {OURS, MIXTRAL, *(f"{OURS}, {backend}" for backend in BACKENDS)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_computes_what_float64_does(dtype):
    variants, _ = layer_variants(SIZE, dtype, CPU)
    found = errors(SIZE, variants, dtype, CPU)
    assert found.keys() >= SPARSE
    assert all(0 < error < (1e-6 if dtype == torch.float32 else 2e-2) for error in found.values())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_layer_that_computes_something_else_is_not_compared(which):
    weights = random_weights(SIZE, torch.float32, CPU)
    weights[which] = weights[which] * 1.001
    with pytest.raises(BenchError, match=r"24x16x32 in torch\.float32: ours is .* off the reference in float64"):
        errors(SIZE, {OURS: our_layer(SIZE, weights)}, torch.float32, CPU)


def test_the_dense_layer_has_the_arithmetic_of_the_experts():
    x_1TD = torch.randn(1, SIZE.tokens, SIZE.width)
    ours = our_layer(SIZE, random_weights(SIZE, torch.float32, CPU), "eager")
    counted = {}
    for name, module in ((DENSE, dense_layer(SIZE, torch.float32, CPU)), (OURS, ours)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x_1TD)
        counted[name] = counter.get_total_flops()
    router = 2 * SIZE.tokens * SIZE.width * SIZE.experts
    assert counted == {DENSE: SIZE.flops, OURS: SIZE.flops + router}


@pytest.mark.parametrize("phase", PHASES)
def test_the_matrix_products_alone_are_those_of_the_dense_layer(phase):
    dense = dense_layer(SIZE, torch.float32, CPU)
    counted = {}
    for name, call in layer._calls({DENSE: dense}, SIZE, torch.float32, phase, CPU).items():
        with FlopCounterMode(display=False) as counter:
            call()
        counted[name] = counter.get_total_flops()
    assert counted == dict.fromkeys((DENSE, layer.PRODUCTS), SIZE.flops * (1 if phase == FORWARD else 3))


def test_the_products_in_float8_are_those_of_the_forward_pass(monkeypatch):
    """They run on a CPU, too. The counter of FLOPs does not know them."""
    flops, product = [], F.scaled_mm

    def counted(rows, weight, *scales, **dtype):
        out = product(rows, weight, *scales, **dtype)
        flops.append(2 * out.numel() * rows.shape[1])
        assert (rows.dtype, out.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
        return out

    monkeypatch.setattr(F, "scaled_mm", counted)
    layer.fp8_products(SIZE, torch.bfloat16, CPU)()
    assert sum(flops) == SIZE.flops


def test_kernels_that_cannot_be_loaded_are_named():
    """Neither can be without a GPU; the note has transformers' reason."""
    variants, notes = layers.kernel_variants(SIZE, random_weights(SIZE, torch.bfloat16, CPU))
    assert not variants
    for name, note in zip(("sonicmoe", "deepgemm"), notes, strict=True):
        assert re.match(rf"24x16x32, torch\.bfloat16: {name} left out: .*(kernels|CUDA)", note)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_of_deepspeed_is_compared_if_it_is_installed(dtype, deepspeed):
    variants, notes = layer_variants(SIZE, dtype, CPU)
    assert not notes
    assert 0 < errors(SIZE, variants, dtype, CPU)[DEEPSPEED] < (1e-6 if dtype == torch.float32 else 2e-2)
    assert layer_variants(LayerSize(24, 16, 32, top_k=1), dtype, CPU)[1] == [
        "DeepSpeed's MoE layer: left out with top-1, whose weight it does not normalise to 1"
    ]


def test_variants_share_their_weights():
    variants, _ = layer_variants(SIZE, torch.float32, CPU)
    places = {tuple(parameter.data_ptr() for parameter in variants[name].parameters()) for name in SPARSE}
    assert len(places) == 1


def test_what_batched_mm_would_copy_is_limited(monkeypatch):
    monkeypatch.setattr(layers, "room_for_copies", lambda device: 24 * 2 * 3 * 16 * 32 * 4 - 1)
    variants, notes = layer_variants(SIZE, torch.float32, CPU)
    assert f"{OURS}, batched_mm" not in variants
    assert notes[0].startswith("24x16x32: batched_mm left out")
    assert f"{OURS}, batched_mm" in layer_variants(SIZE, torch.bfloat16, CPU)[0]


def test_the_report_has_every_case(monkeypatch):
    monkeypatch.setattr(layer, "GROWTH", LayerSize(8, 8, 8))
    sizes = [SIZE, LayerSize(1, 16, 32)]
    report = layer.bench_layer(sizes, [torch.float32], PHASES, 2, True, Console(quiet=True))
    told = [(case["labels"]["TxDxF"], case["labels"]["experts"], case["labels"]["phase"]) for case in report["cases"]]
    of_growth = [("8x8x8", "2 of 4 to 64", phase) for phase in PHASES]
    assert told == [*(("24x16x32", "2 of 4", phase) for phase in PHASES), ("1x16x32", "2 of 4", FORWARD), *of_growth]
    assert all(case["limit"] in case["variants"] for case in report["cases"])
    assert all(case["variants"].keys() >= {DENSE, layer.PRODUCTS} for case in report["cases"])
    assert report["cases"][0]["variants"].keys() >= SPARSE
    growth = report["cases"][-1]["variants"]
    assert growth["ours, 4 experts"]["growth"] == {"median": 1, "low": 1, "high": 1}
    assert growth["ours, grouped_mm, 64 experts"]["growth"]["median"] > 0


@pytest.mark.parametrize(
    ("text", "experts", "top_k", "message"),
    [
        ("640x2048", 4, 2, "--size is '640x2048', but must be tokens, width and FFN width"),
        ("0x8x8", 4, 2, "--size is '0x8x8'"),
        ("8x8x8", 2, 3, "--top-k is 3, but must lie in 1..--experts=2"),
    ],
)
def test_an_invalid_size_is_reported(text, experts, top_k, message):
    with pytest.raises(BenchError) as error:
        parse_size(text, experts, top_k)
    assert message in str(error.value)
