"""Experts in the projector and the vision tower."""

import copy

import pytest
import torch

from moe_llava import MoeLlavaConfig, upcycle
from moe_llava.checkpoints.native import find_target
from moe_llava.common.errors import CheckpointError
from moe_llava.model.losses import balance_loss, z_loss
from moe_llava.model.moe import ProjectorExperts, SparseMlp
from tests.conftest import tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of
from tests.model.test_experts import differ
from tests.vlm import FAMILIES, tiny_vlm, vlm_inputs

EVERYWHERE = ["language_model", "projector", "vision_tower"]
COVERED = {  # family -> what can be sparse outside the language model
    "llava": EVERYWHERE[1:],
    "llava_next": EVERYWHERE[1:],
    "llava_onevision": EVERYWHERE[1:],
    "vipllava": ["vision_tower"],
    "gemma3": ["vision_tower"],
    "paligemma": ["vision_tower"],
    "internvl": ["vision_tower"],
    "smolvlm": ["vision_tower"],
    "idefics3": ["vision_tower"],
    "glm4v": ["vision_tower"],
    "aya_vision": ["vision_tower"],
    "cohere2_vision": ["vision_tower"],
    "qwen3_vl": ["vision_tower"],
    "qwen3_5": ["vision_tower"],
}
SENSITIVE = {"qwen3_5": 1e-5}  # the logits of the dense model itself differ by 3e-6 after noise of 1e-7 in its pixels
OPTIONS = [
    {},
    {"granularity": 2, "num_shared_experts": 1},
    {"use_residual": True, "moe_layers": "all"},
    {"router_bias_rate": 0.1, "capacity_factor": 4.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", COVERED)
@torch.no_grad()
def test_experts_everywhere_compute_the_dense_model(family, options):
    dense, inputs = tiny_vlm(family), vlm_inputs(family)
    real = inputs["attention_mask"].bool()
    sparse = upcycle(dense, num_experts=3, moe_in=["language_model", *COVERED[family]], **options)
    assert differ(dense(**inputs).logits[real], sparse(**inputs).logits[real]) < SENSITIVE.get(family, 2e-6)
    labels = ["tower 0"] if "vision_tower" in COVERED[family] else []
    assert list(sparse.vision_mlps())[: len(labels)] == labels
    assert ("projector" in sparse.vision_mlps()) == ("projector" in COVERED[family])


@pytest.mark.parametrize("family", [family for family in FAMILIES if len(COVERED.get(family, [])) < 2])
def test_what_has_no_known_ffn_is_refused(family):
    """The error names the option, the place, and what was found there."""
    for part in set(EVERYWHERE[1:]) - set(COVERED.get(family, [])):
        place = part.removeprefix("vision_")
        found = "(no row of FFN_FORMS .* describes .*, whose parameters are: |.* has the parameters of a row of FFN_FORMS .* but computes)"
        absent = f"moe_in has {part}, but .*(has no module 'mlp' that experts could replace; its modules are: |has 2 that are known: )"
        with pytest.raises(ValueError, match=rf"^(moe_in is \['{part}'\], but {place}( 0)?: {found}|{absent})") as error:
            upcycle(tiny_vlm(family), moe_in=[part])
        assert "\n" not in str(error.value)


def test_the_tower_without_layers_that_the_model_does_not_use():
    """Features are those after the last layer but one, and moe_layers counts the layers up to there."""
    config = tiny_dense("llama").config
    for feature, placement, expected in [
        (-2, "all", [0, 1, 2]),
        (-1, "all", [0, 1, 2, 3]),
        ([-3, 1], "all", [0, 1]),
        (-2, "interval", [0, 2]),
        (-1, "second_half", [2, 3]),
    ]:
        config.vision_feature_layer, config.vision_config.num_hidden_layers = feature, 4
        dense = type(tiny_dense("llama"))(copy.deepcopy(config)).eval()
        sparse = upcycle(dense, moe_in=["vision_tower"], moe_layers=placement)
        assert list(sparse.vision_mlps()) == [f"tower {index}" for index in expected]
        assert sparse.sparse_mlps() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe_in": []}, r"moe_in is \[\], but must name some of language_model, projector, vision_tower, each once"),
        ({"moe_in": ["tower"]}, r"moe_in is \['tower'\], but must name some of"),
        ({"moe_in": ["projector", "projector"]}, r"but must name some of .*, each once"),
        (
            {"moe_in": ["vision_tower"], "moe_layers": [0]},
            r"moe_layers is \[0\], but indices mean layers of the language model: with vision_",
        ),
        ({"moe_in": EVERYWHERE, "routing": "modality_split"}, r"moe_in is .*, but must be \['language_model'\] for routing modality_split"),
        ({"moe_in": EVERYWHERE, "routing": "smoes"}, r"but must be \['language_model'\] for routing smoes"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        MoeLlavaConfig(**options)


def test_a_cut_that_does_not_fit_names_the_place():
    with pytest.raises(ValueError, match=r"but tower 0: granularity is 3, but must divide the width of the FFN, 32"):
        upcycle(tiny_dense("llama"), moe_in=EVERYWHERE, granularity=3)


def everywhere(**options):
    """A sparse model whose experts all differ, with indices in the language model."""
    sparse = upcycle(tiny_dense("llama"), num_experts=4, moe_in=EVERYWHERE, **options)
    with torch.no_grad():
        for mlp in sparse.all_sparse_mlps().values():
            for parameter in mlp.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return sparse


@torch.no_grad()
def test_each_place_mixes_its_own_experts():
    """The outputs of tower and projector are those of a loop by hand, with every backend."""
    sparse, inputs = everywhere(), tiny_inputs()
    found = {}

    def by_hand(mlp, arguments, output):
        (x_BSD,) = arguments
        x_TD, rows = x_BSD.flatten(0, -2), []
        _, weights_TK, ids_TK, _ = mlp.router(x_TD)
        for x_D, weights_K, ids_K in zip(x_TD, weights_TK, ids_TK, strict=True):
            e = mlp.experts
            outputs = [e.down_proj[i] @ e.act_fn(e.up_proj[i] @ x_D + e.up_proj_bias[i]) + e.down_proj_bias[i] for i in ids_K]
            rows.append(sum(w * y for w, y in zip(weights_K, outputs, strict=True)))
        found[mlp] = (output.flatten(0, -2), torch.stack(rows))

    for mlp in sparse.vision_mlps().values():
        mlp.register_forward_hook(by_hand)
    expected = None
    for backend in ("eager", "auto", "grouped_mm", "batched_mm"):
        sparse.set_experts_implementation(backend)
        logits = sparse(**inputs).logits
        assert len(found) == 2
        for output, rows in found.values():
            assert differ(rows, output) < 2e-6
        expected = logits if expected is None else expected
        assert differ(expected, logits) < 5e-6
    assert isinstance(sparse.vision_mlps()["projector"].experts, ProjectorExperts)


@pytest.mark.parametrize("over", ["process", "sequence", "step"])
def test_their_losses_are_added_without_padding_of_the_text(over):
    sparse, inputs = everywhere(balance_over=over, router_z_loss_coef=0.1).train(), tiny_inputs()
    inputs["attention_mask"][0, -3:] = 0
    outputs = sparse(**inputs, labels=labels_of(inputs), output_router_logits=True)
    mask_T = inputs["attention_mask"].flatten().bool()
    assert [logits.shape for logits in outputs.vision_router_logits] == [(2 * 5, 4), (2 * 4, 4)]  # with the class token in the tower
    assert len(outputs.router_logits) == 2
    rows = 2 if over == "sequence" else 1
    balance = balance_loss(outputs.router_logits, mask_T, rows=rows) + balance_loss(outputs.vision_router_logits)
    z = z_loss(outputs.router_logits, mask_T) + z_loss(outputs.vision_router_logits)
    torch.testing.assert_close(outputs.aux_loss, balance)
    torch.testing.assert_close(outputs.z_loss, z)
    torch.testing.assert_close(outputs.loss, outputs.language_loss + 0.01 * balance + 0.1 * z)
    outputs.loss.backward()
    for mlp in sparse.vision_mlps().values():
        assert mlp.router.weight.grad.any()
        assert all(parameter.grad.any() for parameter in mlp.experts.parameters())


def test_a_batch_without_images_adds_no_losses_there():
    sparse, inputs = everywhere(router_z_loss_coef=0.1, router_bias_rate=0.1).train(), tiny_inputs()
    del inputs["pixel_values"]
    inputs["input_ids"][inputs["input_ids"] == 98] = 5
    outputs = sparse(**inputs, labels=labels_of(inputs), output_router_logits=True)
    assert [logits.shape for logits in outputs.vision_router_logits] == [(0, 4)] * 2
    torch.testing.assert_close(outputs.aux_loss, balance_loss(outputs.router_logits))
    torch.testing.assert_close(outputs.z_loss, z_loss(outputs.router_logits))
    outputs.loss.backward()
    sparse.update_router_bias()
    for label, mlp in sparse.all_sparse_mlps().items():
        assert mlp.router.load_bias.bias.any() == isinstance(label, int)


def test_gradient_checkpointing_changes_nothing():
    inputs, found = tiny_inputs(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        sparse = everywhere().train()
        if checkpointing:
            sparse.gradient_checkpointing_enable()
        sparse(**inputs, labels=labels_of(inputs)).loss.backward()
        found.append({name: parameter.grad for name, parameter in sparse.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_images_and_videos_in_one_pass_are_recorded_together():
    """Both go through tower and projector, one after the other."""
    mlp = upcycle(tiny_dense("llama"), moe_in=["projector"]).vision_mlps()["projector"]
    mlp.record = True
    first, second = torch.randn(1, 4, 16), torch.randn(2, 4, 16)
    mlp(first), mlp(second)
    expected = mlp.router(torch.cat([first, second]).flatten(0, 1))
    recorded = mlp.take_record()
    torch.testing.assert_close(recorded["router_logits"], expected[0])
    assert torch.equal(recorded["router_choices"], expected[2])


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    sparse, inputs = everywhere(router_bias_rate=0.1), tiny_inputs()
    sparse.vision_mlps()["projector"].router.load_bias.bias[1] = 3.0
    sparse.save_pretrained(tmp_path)
    loaded = type(sparse).from_pretrained(tmp_path)
    assert loaded.config.moe_in == EVERYWHERE
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sparse.state_dict().items())
    assert differ(sparse(**inputs).logits, loaded(**inputs).logits) < 2e-6
    base = type(sparse.model).from_pretrained(tmp_path)
    assert list(base.vision_mlps()) == ["tower 0", "projector"]
    assert differ(sparse.model(**inputs).last_hidden_state, base(**inputs).last_hidden_state) < 2e-6
    assert sum(isinstance(module, SparseMlp) for module in base.modules()) == 4


def test_no_native_architecture_has_them():
    with pytest.raises(CheckpointError, match="no native architecture can express experts in language_model and projector"):
        find_target(upcycle(tiny_vlm("llava"), moe_in=["language_model", "projector"]))


@torch.no_grad()
def test_experts_from_several_models_and_with_noise():
    first, second = tiny_dense("llama", seed=1), tiny_dense("llama", seed=2)
    sparse = upcycle(first, experts_from=[first, second], num_experts=2, moe_in=EVERYWHERE)
    assert torch.equal(sparse.vision_mlps()["projector"].experts.up_proj[1], second.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(sparse.vision_mlps()["tower 0"].experts.up_proj[1], second.model.vision_tower.encoder.layers[0].mlp.fc1.weight)
    for start in ("noise", "drop"):
        experts = upcycle(first, expert_start=start, moe_in=EVERYWHERE).vision_mlps()["projector"].experts
        assert not torch.equal(experts.down_proj[0], experts.down_proj[1])
