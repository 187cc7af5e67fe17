"""Vision-language models of several families: upcycled, each computes what its dense origin computes."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.model import modeling
from tests.vlm import CLIP, FAMILIES, MROPE, TEXT, tiny_vlm, vlm_inputs


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


@pytest.mark.parametrize("images", [(0, 0), (1, 1), (2,), (1, 0, 2)], ids=str)
@torch.no_grad()
def test_upcycled_computes_what_dense_computes(family, dense, images):
    inputs = vlm_inputs(family, images)
    sparse, real = upcycle(dense, num_experts=4), inputs["attention_mask"].bool()
    closely(sparse(**inputs).logits[real], dense(**inputs).logits[real])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "suppress_tokens": sparse.generation_config.suppress_tokens}
    assert torch.equal(sparse.generate(**inputs, **settings), dense.generate(**inputs, **settings))


def fields_of(config, added=("architectures", "dtype")):
    """The fields of a configuration and its parts, without those that a model adds: `upcycle` also says in the text config what is tied."""
    own = {name: value for name, value in config.items() if name not in added}
    return {name: fields_of(value, (*added, "tie_word_embeddings")) if isinstance(value, dict) else value for name, value in own.items()}


def test_the_dense_configuration(family, dense):
    assert fields_of(upcycle(dense).config.dense_config().to_dict()) == fields_of(dense.config.to_dict())


@torch.no_grad()
def test_padding_on_the_right(family, dense):
    inputs = vlm_inputs(family, (1, 0, 2), side="right")
    real = inputs["attention_mask"].bool()
    closely(upcycle(dense, num_experts=4)(**inputs).logits[real], dense(**inputs).logits[real])


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


def labelled(family, images=(1, 1)):
    """Inputs, with the last four tokens of each row as labels."""
    inputs = vlm_inputs(family, images)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return inputs | {"labels": labels}


def trained(model, inputs, **settings):
    """(outputs, gradients by name) of a step, from no gradients."""
    model.train()
    model.zero_grad()
    outputs = model(**inputs, output_router_logits=True, **settings)
    outputs.loss.backward()
    model.eval()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_training(family, noisy):
    """The loss is the sum of its parts, gradients reach every router and expert, and recomputed activations change nothing."""
    model, inputs = copy.deepcopy(noisy), labelled(family)
    outputs, gradients = trained(model, inputs)
    coefficient = model.config.router_aux_loss_coef
    torch.testing.assert_close(outputs.loss, outputs.language_loss + coefficient * outputs.aux_loss)
    with torch.no_grad():
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    expected = F.cross_entropy(logits[:, -5:-1].reshape(-1, 99), inputs["labels"][:, -4:].reshape(-1))
    torch.testing.assert_close(outputs.language_loss, expected)
    layers = model.config.moe_layer_indices
    assert [logits.shape for logits in outputs.router_logits] == [(inputs["input_ids"].numel(), 4)] * len(layers)
    for mlp in model.sparse_mlps().values():
        assert all(parameter.grad.abs().sum() > 0 for parameter in (mlp.router.weight, *mlp.experts.parameters()))
    recomputing = copy.deepcopy(noisy)
    recomputing.gradient_checkpointing_enable()
    again, others = trained(recomputing, inputs)
    closely(again.loss, outputs.loss, 1e-6)
    assert len(again.router_logits) == len(layers)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        closely(others[name], gradient, 1e-6)


def test_halves_of_a_batch_sum_to_the_whole(family):
    """Without the balance loss, which is no sum over tokens."""
    model, inputs = upcycle(tiny_vlm(family), num_experts=4, expert_start="noise", router_aux_loss_coef=0.0), labelled(family)
    whole, expected = trained(model, inputs)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    halves = [{name: value.chunk(2)[half] for name, value in inputs.items()} for half in range(2)]
    # Labels are the last four tokens of both rows.
    (first, one), (second, other) = [
        (outputs.loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()})
        for outputs, gradients in (trained(model, half, num_items_in_batch=8) for half in halves)
    ]
    closely(first + second, whole.loss)
    assert one.keys() | other.keys() == expected.keys()
    for name, gradient in expected.items():
        found = one.get(name, torch.zeros_like(gradient)) + other.get(name, torch.zeros_like(gradient))
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_takes_no_capacity(family, dense, side):
    model, inputs, number = upcycle(dense, num_experts=4, capacity_factor=1.0), vlm_inputs(family, (1,)), 24
    padding = (number, 0) if side == "left" else (0, number)
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    padded = {name: F.pad(value, padding) if name in tokens else value for name, value in inputs.items()}
    real = padded["attention_mask"].bool()
    expected, found = (model(**batch, output_router_logits=True) for batch in (inputs, padded))
    closely(found.logits[real], expected.logits[0])
    for alone, drops in zip(expected.router_drops, found.router_drops, strict=True):
        assert alone.any()
        assert torch.equal(drops[real[0]], alone)
        assert not drops[~real[0]].any()


def test_lora_on_experts(family, noisy):
    names = sorted({f"mlp.experts.{name}" for mlp in noisy.sparse_mlps().values() for name in mlp.experts.stacked if "bias" not in name})
    model = peft.get_peft_model(noisy, peft.LoraConfig(target_parameters=names, target_modules=[], r=2, init_lora_weights=False))
    outputs, gradients = trained(model, labelled(family))
    assert outputs.aux_loss.isfinite()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == gradients.keys()
    assert len(gradients) == 2 * len(names) * len(noisy.config.moe_layer_indices)
    assert all("lora_" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


@torch.no_grad()
def test_the_language_loss_is_the_cross_entropy(family, noisy):
    inputs = vlm_inputs(family, (0,))
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


@pytest.mark.parametrize("images", [(1, 0, 2), (0, 0)], ids=str)
@pytest.mark.parametrize("options", [{"routing": "modality_split"}, {"routing": "smoes"}, {"capacity_factor": 1.0}, {"use_residual": True}])
def test_options(family, dense, options, images):
    model = upcycle(dense, num_experts=4, **options)
    outputs, gradients = trained(model, labelled(family, images))
    assert outputs.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def native_moe():
    text = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "rope_parameters": MROPE}
    return AutoConfig.for_model("qwen3_vl_moe", text_config=text, **FAMILIES["qwen3_vl"].settings)


def kosmos():
    text = {"vocab_size": 99, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4}
    return AutoConfig.for_model("kosmos-2", text_config=text, vision_config=CLIP | {"projection_dim": 16}, latent_query_num=4)


def blip():
    text = {"model_type": "t5", "vocab_size": 99, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    queries = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 16}
    return AutoConfig.for_model("blip-2", text_config=text, vision_config=CLIP, qformer_config=queries)


REFUSED = {
    native_moe: r"^Qwen3VLMoeForConditionalGeneration is sparse already, its layers have experts: it can be traced, evaluated, served",
    kosmos: r"^Kosmos2TextBlock has no module 'mlp' that experts could replace; its modules are: .*, ffn, ",
    blip: r"^Blip2ForConditionalGeneration has no decoder layers that could become sparse$",
}


@pytest.mark.parametrize("config", REFUSED, ids=lambda value: value.__name__)
def test_refusals(config):
    """One line, which names what was found. tests/model/test_upcycling.py has text-only and sparse models."""
    with pytest.raises(ValueError, match=REFUSED[config]) as error:
        upcycle(AutoModelForImageTextToText.from_config(config()))
    assert "\n" not in str(error.value)
