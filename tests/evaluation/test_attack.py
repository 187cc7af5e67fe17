"""Attacks stay within epsilon and within pixels, hurt more than noise does, and leave the model as it was."""

import pytest
import torch
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from moe_llava.evaluation.stress.attack import answer_losses, attacked_pixels, fgsm, own_answers, pgd, pixel_range
from moe_llava.evaluation.stress.perturb import Perturbation
from moe_llava.model.moe import Router
from moe_llava.model.upcycling import upcycle
from tests.conftest import tiny_dense, tiny_inputs

PROCESSOR = LlavaImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
PIXELS = pixel_range(PROCESSOR)
EPSILON = 2  # small: a step that is too long for the rough landscape of random weights lands anywhere


def tiny_sparse(family):
    """Return a sparse model with different experts and decided routers."""
    sparse = upcycle(tiny_dense(family), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for mlp in sparse.sparse_mlps().values():
            for parameter in mlp.experts.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
            mlp.router.weight.normal_()
    return sparse.eval()


@pytest.fixture(scope="module", params=["dense", "llama", "phi"])
def model(request):
    return tiny_dense("llama") if request.param == "dense" else tiny_sparse(request.param)


def batch(rows=3):
    """Return inputs with pixels of all levels, and labels on the last four tokens of each row."""
    inputs = tiny_inputs(rows)
    levels = torch.randint(0, 256, inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(3))
    levels[..., :2] = 0  # some at the edge of the range
    levels[..., -2:] = 255
    inputs["pixel_values"] = PIXELS.black + levels * PIXELS.unit
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return inputs, labels


def attacked(kind, model, inputs, labels, epsilon=EPSILON, seed=0):
    if kind == "fgsm":
        return fgsm(model, inputs, labels, PIXELS, epsilon)
    return pgd(model, inputs, labels, PIXELS, epsilon, steps=6, step_size=epsilon / 3, seed=seed)


def loss(model, inputs, labels, pixel_values):
    with torch.no_grad():
        return answer_losses(model, {**inputs, "pixel_values": pixel_values}, labels)


def levels_away(pixel_values, inputs):
    return ((pixel_values - inputs["pixel_values"]) / PIXELS.unit).abs().max().item()


def within_pixels(pixel_values):
    return bool(((pixel_values >= PIXELS.black) & (pixel_values <= PIXELS.white)).all())


def test_pixel_range():
    assert PIXELS.black.flatten().tolist() == pytest.approx([-2, -2, -2])
    assert PIXELS.white.flatten().tolist() == pytest.approx([3, 2, 4 / 3])
    assert PIXELS.unit.flatten().tolist() == pytest.approx([1 / 51, 1 / 63.75, 1 / 76.5])
    plain = pixel_range(LlavaImageProcessorPil(do_normalize=False))
    assert (plain.black.item(), plain.white.item()) == (0, pytest.approx(1))


def test_logits_are_computed_where_labels_are_and_nowhere_else(model):
    """All others of a real vocabulary would take gigabytes."""
    inputs, labels = batch()
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda *arguments: shapes.append(arguments[2].shape[:2]))
    found = answer_losses(model, inputs, labels)
    hook.remove()
    assert shapes == [(3, 4)]
    logits = model(**inputs).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none").sum(1) / 4
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_within_epsilon_and_worse_than_noise(model, kind):
    inputs, labels = batch()
    found = attacked(kind, model, inputs, labels)
    assert levels_away(found, inputs) == pytest.approx(EPSILON, abs=1e-3)
    assert within_pixels(found)
    hurt = loss(model, inputs, labels, found)
    assert (hurt > loss(model, inputs, labels, inputs["pixel_values"])).all()
    generator = torch.Generator().manual_seed(4)
    noisy = []
    for _ in range(20):
        signs = torch.randint(0, 2, found.shape, generator=generator) * 2 - 1
        pixels = (inputs["pixel_values"] + signs * EPSILON * PIXELS.unit).clamp(PIXELS.black, PIXELS.white)
        noisy.append(loss(model, inputs, labels, pixels))
    # One step is not always better than the best of twenty in any direction.
    best = torch.stack(noisy).amax(dim=0) if kind == "pgd" else torch.stack(noisy).mean(dim=0)
    assert (hurt > best).all()


def test_more_steps_and_more_epsilon_hurt_more(model):
    inputs, labels = batch()
    losses = [loss(model, inputs, labels, inputs["pixel_values"]).sum()]
    losses += [loss(model, inputs, labels, attacked("pgd", model, inputs, labels, epsilon)).sum() for epsilon in (1, 4, 16)]
    assert losses == sorted(losses)
    assert losses[-1] > loss(model, inputs, labels, attacked("fgsm", model, inputs, labels, 16)).sum()


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_nothing_else_changes(model, kind):
    inputs, labels = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {name: value.clone() for name, value in inputs.items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    first = attacked(kind, model, inputs, labels)
    assert torch.equal(first, attacked(kind, model, inputs, labels))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(torch.equal(value, inputs[name]) for name, value in given.items())
    assert not first.requires_grad
    model.zero_grad()


def test_seeds_differ(model):
    inputs, labels = batch()
    assert not torch.equal(attacked("pgd", model, inputs, labels), attacked("pgd", model, inputs, labels, seed=1))


def test_a_picture_does_not_depend_on_its_batch(model):
    inputs, labels = batch()
    whole = attacked("pgd", model, inputs, labels)
    alone = attacked("pgd", model, {name: value[1:2] for name, value in inputs.items()}, labels[1:2])
    # A gradient near 0 may fall on the other side of it.
    assert torch.isclose(whole[1:2], alone, atol=1e-5).float().mean() > 0.98


def test_the_routers_are_in_the_gradient():
    """The gradient agrees with differences of the loss; without the routers it would not."""
    model = tiny_sparse("llama")
    inputs, labels = batch(1)
    pixels = inputs["pixel_values"].requires_grad_()

    def slope():
        (gradient,) = torch.autograd.grad(answer_losses(model, inputs, labels).sum(), pixels)
        return gradient

    full = slope()
    step = 1e-3 * full / full.norm()
    difference = loss(model, inputs, labels, pixels + step) - loss(model, inputs, labels, pixels - step)
    assert difference.item() / 2e-3 == pytest.approx(full.norm().item(), rel=0.02)
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, given, out: (out[0], out[1].detach(), *out[2:]))
    assert (slope() - full).norm() > 0.05 * full.norm()


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision(kind, how):
    inputs, labels = batch()
    for model in (tiny_dense("llama"), tiny_sparse("llama")):
        if how == "bfloat16":
            model = model.bfloat16()
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = attacked(kind, model, inputs, labels)
            hurt = loss(model, inputs, labels, found.to(inputs["pixel_values"].dtype))
            clean = loss(model, inputs, labels, inputs["pixel_values"])
        assert found.dtype == torch.float32
        assert levels_away(found, {"pixel_values": inputs["pixel_values"].float()}) <= EPSILON + 1e-3
        assert within_pixels(found)
        assert hurt.sum() > clean.sum()


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_inputs_against_the_models_own_answers(model, name):
    """The attack works in inference mode, as in an evaluation, and with padding on the left."""
    with torch.inference_mode():
        inputs, _ = batch()
        inputs["attention_mask"][0, 0] = 0
        found = attacked_pixels(model, PROCESSOR, inputs, Perturbation(name, strength=2), max_new_tokens=5)
        assert 0 < levels_away(found, inputs) <= 2 + 1e-3
        continued, labels = own_answers(model, inputs, 5)
    hurt = loss(model, continued, labels, found)
    assert (hurt > loss(model, continued, labels, inputs["pixel_values"])).all()


def test_own_answers_end():
    """Tokens after the first end are padding."""
    model = tiny_dense("llama")
    inputs, _ = batch()
    free, _ = own_answers(model, inputs, 6)
    start = inputs["input_ids"].shape[1]
    said = free["input_ids"][:, start:]
    model.generation_config.eos_token_id = end = int(said[0, 2])
    continued, labels = own_answers(model, inputs, 6)
    first = said[0].tolist().index(end) + 1
    assert labels[0, start:].tolist()[: first + 1] == [*said[0, :first].tolist(), -100]
    assert continued["attention_mask"][0].sum() == start + first
    assert (labels[:, :start] == -100).all()


def test_refusals(model):
    inputs, labels = batch()
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with pytest.raises(ValueError, match="no images"):
        fgsm(model, text, labels, PIXELS, 1)
    with pytest.raises(ValueError, match=r"from -2.00 to 3.00, but those of the image processor from 0.00 to 1.00"):
        fgsm(model, inputs, labels, pixel_range(LlavaImageProcessorPil(do_normalize=False)), 1)
    model.train()
    with pytest.raises(ValueError, match="in training"):
        fgsm(model, inputs, labels, PIXELS, 1)
    model.eval()
