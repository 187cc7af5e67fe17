"""Vision-language models of several families: upcycled, each computes what its dense origin computes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.model import modeling
from tests.vlm import FAMILIES, tiny_vlm, vlm_inputs


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def dense(family):
    return tiny_vlm(family)


@pytest.fixture
def noisy(family):
    """Its experts differ."""
    return upcycle(tiny_vlm(family), num_experts=4, expert_start="noise")


def closely(found, expected, tolerance=1e-5):
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("with_images", [True, False])
@torch.no_grad()
def test_upcycled_computes_what_dense_computes(family, dense, with_images):
    inputs = vlm_inputs(family, with_images=with_images)
    sparse, real = upcycle(dense, num_experts=4), inputs["attention_mask"].bool()
    closely(sparse(**inputs).logits[real], dense(**inputs).logits[real])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "suppress_tokens": sparse.generation_config.suppress_tokens}
    assert torch.equal(sparse.generate(**inputs, **settings), dense.generate(**inputs, **settings))


@torch.no_grad()
def test_saved_is_loaded(family, noisy, tmp_path):
    pickled = pickle.dumps(noisy)
    noisy.save_pretrained(tmp_path)
    inputs = vlm_inputs(family)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(noisy) is getattr(modeling, type(noisy).__name__)
    assert torch.equal(loaded(**inputs).logits, noisy(**inputs).logits)
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"moe_{family}"
    assert type(AutoModel.from_pretrained(tmp_path)) is type(noisy.base_model)
    assert torch.equal(pickle.loads(pickled)(**inputs).logits, noisy(**inputs).logits)


def trained(model, family, **settings):
    """(outputs, gradients by name) of a step."""
    inputs = vlm_inputs(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-4] = -100
    model.train()
    outputs = model(**inputs, labels=labels, output_router_logits=True, **settings)
    outputs.loss.backward()
    model.eval()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_training(family, noisy):
    """The loss is the sum of its parts, gradients reach every router and expert, and recomputed activations change nothing."""
    model = copy.deepcopy(noisy)
    outputs, gradients = trained(model, family)
    coefficient = model.config.router_aux_loss_coef
    torch.testing.assert_close(outputs.loss, outputs.language_loss + coefficient * outputs.aux_loss)
    layers = model.config.moe_layer_indices
    assert [logits.shape for logits in outputs.router_logits] == [(vlm_inputs(family)["input_ids"].numel(), 4)] * len(layers)
    for mlp in model.sparse_mlps().values():
        assert all(parameter.grad.abs().sum() > 0 for parameter in (mlp.router.weight, *mlp.experts.parameters()))
    recomputing = copy.deepcopy(noisy)
    recomputing.gradient_checkpointing_enable()
    again, others = trained(recomputing, family)
    torch.testing.assert_close(again.loss, outputs.loss)
    assert len(again.router_logits) == len(layers)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_language_loss_is_the_cross_entropy(family, noisy):
    inputs = vlm_inputs(family, with_images=False)
    inputs = {name: value[1:] for name, value in inputs.items()}  # the longest row, without padding
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    model = copy.deepcopy(noisy)
    expected = F.cross_entropy(model(**inputs).logits[0, 3:-1].float(), labels[0, 4:])
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    found = model(**inputs, labels=labels, num_items_in_batch=2 * labels[:, 4:].numel()).loss
    torch.testing.assert_close(found, expected / 2)
    assert model(**inputs).router_logits is None


@torch.no_grad()
def test_backends_compute_the_same(family, noisy):
    model, inputs = copy.deepcopy(noisy), vlm_inputs(family)
    found = []
    for backend in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(backend)
        found.append(model(**inputs).logits[inputs["attention_mask"].bool()])
    closely(found[1], found[0])
    closely(found[2], found[0])


@pytest.mark.parametrize("options", [{"routing": "modality_split"}, {"routing": "smoes"}, {"capacity_factor": 1.0}, {"use_residual": True}])
def test_options(family, dense, options):
    model = upcycle(dense, num_experts=4, **options)
    outputs, _ = trained(model, family)
    assert outputs.loss.isfinite()
