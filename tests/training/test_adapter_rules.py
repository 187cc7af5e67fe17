"""What a stage with an adapter refuses, and when it says so."""

import importlib.util

import pytest
from bitsandbytes.nn.parametrize import replace_parameter_4bit

from moe_llava import upcycle
from moe_llava.experiments.demo import demo_recipe
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.conftest import tiny_dense
from tests.training.test_adapters import adapted, with_adapter
from tests.training.test_run import QUIET


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (1, {}, "stage1.adapter is set, but stage I trains only the projector"),
        (2, {"targets": ["experts"]}, "stage2.adapter.targets names experts, but must name some of attention, FFN; only stage III has"),
        (3, {"targets": ["expert"]}, "stage3.adapter.targets names expert, but must name some of attention, FFN, experts, routers"),
        (3, {"targets": []}, r"targets is \[\], but must name attention, FFN or experts"),
        (3, {"targets": ["routers"]}, r"targets is \['routers'\], but must name attention, FFN or experts"),
        (3, {"dropout": 0.1}, "dropout is 0.1, but must be 0 with experts among the targets: LoRA is added to the stacked weights"),
        (3, {"use_dora": True}, "use_dora is true, but must be false with experts among the targets: PEFT has no DoRA"),
        (2, {"targets": ["FFN"], "quantise_experts": True}, "stage2.adapter.quantise_experts is true, but only stage III has experts"),
        (3, {"quantise_experts": True}, "quantise_experts is true, but needs quantisation, nf4 or int8"),
        (3, {"rank": 0}, "rank is 0, but must be above 0"),
        (3, {"alpha": 0}, "alpha is 0, but must be above 0"),
        (2, {"targets": ["FFN"], "dropout": 1.0}, r"dropout is 1.0, but must be below 1"),
        (3, {"more": ["stage3.moe.router_bias_rate=0.01"]}, "targets is .* without routers, but stage3.moe.router_bias_rate is 0.01"),
        (2, {"targets": ["FFN"], "quantisation": "fp4"}, "quantisation is 'fp4', but must be one of nf4, int8, or null"),
    ],
)
def test_settings_that_cannot_work(write_recipe, stage, settings, message):
    with pytest.raises(RecipeError, match=message):
        with_adapter(write_recipe, stage, **{"targets": ["attention", "experts"], **settings})


def test_the_demo_takes_none(write_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"stage3.adapter is set, but the demo compares experts with FFNs that are trained in full"):
        demo_recipe(tmp_path, load_recipe(write_recipe(stage3__adapter={"targets": ["experts"]})))


def test_they_are_reported_at_once(write_recipe):
    with pytest.raises(RecipeError) as error:
        with_adapter(write_recipe, 3, ["experts"], ["stage3.dense=true"], dropout=0.1, use_dora=True)
    assert len(str(error.value).splitlines()) == 4


def test_what_only_the_model_tells(write_recipe, tmp_path, monkeypatch):
    recipe = with_adapter(write_recipe, 3, ["FFN"], ["stage3.moe.moe_layers=all"])
    with pytest.raises(RecipeError, match=r"stage3.adapter.targets names FFN, but the language model of this stage has none"):
        train(recipe, [1, 2, 3], resume=False, console=QUIET)
    recipe = with_adapter(write_recipe)
    recipe.stage3.dense = True
    with pytest.raises(RecipeError, match="the dense baseline trains its FFNs in full"):
        train(recipe, [1, 2, 3], resume=False, console=QUIET)
    recipe = with_adapter(write_recipe, quantisation="nf4")
    find = importlib.util.find_spec
    for package in ("peft", "bitsandbytes"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, gone=package: None if name == gone else find(name))
            with pytest.raises(RecipeError, match=rf"needs {package}, which is not installed: pip install -e '\.\[adapters\]'"):
                train(recipe, [1, 2, 3], resume=False, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_an_adapter_taken_out_of_the_recipe_is_noticed(write_recipe):
    train(load_recipe(write_recipe()), [1], resume=False, console=QUIET)
    train(with_adapter(write_recipe, 2, ["attention"]), [2], resume=False, console=QUIET)
    with pytest.raises(RecipeError, match=r"stage2 was made with .*stage2.adapter.rank 2, now None"):
        train(load_recipe(write_recipe()), [2], resume=True, console=QUIET)


def test_quantised_experts_are_refused():
    sparse = upcycle(tiny_dense("llama"))
    replace_parameter_4bit(sparse.model.language_model.layers[0].mlp.experts, "down_proj", quant_type="nf4")
    with pytest.raises(RecipeError, match=r"layers.0.mlp.experts is quantised: LoRA over them would leave matrices without a gradient"):
        adapted(sparse, "experts")
