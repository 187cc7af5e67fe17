"""Adapters: what learns, what a stage leaves, merging, going on, quantised bases."""

import io
import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.checkpoints import load
from moe_llava.common.errors import CheckpointError
from moe_llava.training import adapters, run
from moe_llava.training.parts import parts_of
from moe_llava.training.recipe import Adapter, RecipeError, load_recipe
from moe_llava.training.run import train
from tests.conftest import tiny_dense, tiny_inputs, wide_dense
from tests.training.test_run import QUIET, log, parameters

ALL = ["attention", "FFN", "experts", "routers"]


def adapted(model, *targets, stage="stage3", **settings):
    model, counts = adapters.attach(model, Adapter(list(targets), rank=2, alpha=4, **settings), stage, "base")
    return model.train(), counts


def step(model, inputs):
    """Two steps along the gradient: the first factor of LoRA learns nothing while the second is zero, as it is at the start."""
    for _ in range(2):
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.5 * parameter.grad)


def learning(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize(
    ("target", "places"),
    [
        (["attention"], [".self_attn."]),
        (["FFN"], [".layers.1.mlp.", ".layers.3.mlp."]),
        (["experts"], [".mlp.experts."]),
        (["experts", "routers"], [".mlp.experts.", ".mlp.router."]),
        (ALL, [".self_attn.", ".layers.1.mlp.", ".layers.3.mlp.", ".mlp.experts.", ".mlp.router."]),
    ],
    ids=lambda value: "+".join(value) if value[0] in ALL else "",
)
def test_a_target_learns_and_nothing_else_does(family, target, places):
    sparse = upcycle(tiny_dense(family))
    total = sparse.num_parameters()
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    model, counts = adapted(sparse, *target)
    step(model, tiny_inputs())
    chosen = learning(model)
    assert all(".language_model.layers." in name and any(place in name for place in places) for name in chosen)
    assert all(any(place in name for name in chosen) for place in places)
    assert {name for name, value in chosen.items() if value.grad is None or not value.grad.any()} == set()
    assert sum(counts.trained.values()) == sum(value.numel() for value in chosen.values())
    assert {part.split()[0] for part in counts.trained} == set(target)
    assert counts.total == total + sum(value.numel() for name, value in chosen.items() if ".lora_" in name)
    base = model.unload().state_dict()
    assert {name for name in before if not torch.equal(before[name], base[name])} <= {name for name in before if ".router." in name}


def test_what_learns_in_stage_two():
    model, counts = adapted(tiny_dense("llama"), "attention", "FFN", stage="stage2")
    step(model, tiny_inputs())
    chosen = learning(model)
    assert all(".language_model.layers." in name or ".multi_modal_projector." in name for name in chosen)
    assert all(value.grad.any() for value in chosen.values())
    assert counts.trained.keys() == {"projector", "attention adapter", "FFN adapter"}


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_residual_ffn_and_its_coefficients(family):
    model, _ = adapted(upcycle(tiny_dense(family), use_residual=True, moe_layers="all"), "FFN", "experts", "routers")
    step(model, tiny_inputs())
    chosen = learning(model)
    assert any(".residual_mlp." in name for name in chosen)
    assert any(".coefficient." in name and ".lora_" not in name for name in chosen)
    assert all(value.grad.any() for value in chosen.values())


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("settings", [{}, {"capacity_factor": 0.8}, {"use_residual": True}, {"routing": "modality_split"}], ids=str)
def test_merged_computes_what_the_adapter_computes(family, settings, tmp_path, monkeypatch):
    """And so does the base with the adapter as PEFT loads it; with a capacity, padding takes no expert's place there either."""
    upcycle(tiny_dense(family), **settings).save_pretrained(tmp_path / "base")
    model, _ = adapted(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), *ALL)
    inputs = tiny_inputs()
    inputs["attention_mask"][0, -4:] = 0
    before = model.eval()(**inputs).logits
    step(model.train(), inputs)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = model(**inputs).logits
    assert (expected - before).abs().max() > 1e-2

    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(**inputs).logits, expected)

    monkeypatch.setattr(adapters, "load_checkpoint", lambda path, dtype: (AutoModelForImageTextToText.from_pretrained(path), None))
    merged, _ = adapters.merge(tmp_path / "adapter", tmp_path / "base")
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert type(again).__name__ == "MoeLlavaForConditionalGeneration"
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_dora_and_dropout_where_there_are_linear_layers(tmp_path):
    model, _ = adapted(tiny_dense("llama"), "attention", "FFN", stage="stage2", dropout=0.1, use_dora=True)
    step(model, tiny_inputs())
    model.eval()
    expected = model(**tiny_inputs()).logits
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(merged(**tiny_inputs()).logits, expected, atol=1e-5, rtol=0)


# Stages


def with_adapter(write_recipe, stage=3, targets=ALL, more=(), **settings):
    file = write_recipe(**{f"stage{stage}__adapter": {"targets": list(targets), "rank": 2, "alpha": 4, **settings}})
    return load_recipe(file, list(more))


def changed(before, after):
    return {name for name in after if name in before and not torch.equal(before[name], after[name])}


def test_what_stages_with_adapters_leave(write_recipe, tmp_path):
    recipe = with_adapter(write_recipe)
    recipe.stage2.adapter = Adapter(["attention"])
    console = Console(record=True, quiet=False, file=io.StringIO(), width=300)
    one, two, three = train(recipe, [1, 2, 3], resume=False, console=console)
    before, after = parameters(one), parameters(two)
    assert changed(before, after) == {
        name for name in after if "multi_modal_projector" in name or ("language_model" in name and "self_attn" in name and "proj" in name)
    }
    for folder, base in ((two, one), (three, three / "base")):
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
        assert not list(folder.glob("checkpoint-*"))
        small = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert not any("vision_tower" in name or "embed_tokens" in name for name in small)
    start = upcycle(AutoModelForImageTextToText.from_pretrained(two), seed=recipe.seed).state_dict()
    assert changed(start, parameters(three / "base")) == set()
    learnt = changed(start, parameters(three))
    assert all("language_model.layers." in name for name in learnt)
    assert {name.split(".")[-2] for name in learnt} >= {"experts", "router", "q_proj", "down_proj"}

    lines = [line for line in log(three) if "loss" in line]
    assert all(line["loss"] == pytest.approx(line["language_loss"] + 0.01 * line["balance_loss"], abs=2e-4) for line in lines)
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for line in lines for layer in line["expert_shares"])
    text = console.export_text()
    assert "trains projector" in text
    assert "experts adapter" in text
    assert "adapter on a base that is not quantised" in text


@pytest.mark.parametrize(
    ("number", "settings"),
    [(2, {"dropout": 0.1, "quantisation": "nf4"}), (3, {}), (3, {"quantisation": "nf4", "quantise_experts": True})],
    ids=["nf4", "experts", "experts-nf4"],
)
def test_a_run_with_an_adapter_that_was_stopped_ends_like_one_that_was_not(
    write_recipe, put_stage, wide_base, tmp_path, stopping, number, settings
):
    targets = ALL if number == 3 else ["attention", "FFN"]
    recipe = with_adapter(write_recipe, number, targets, [f"stage{number}.optimisation.max_steps=5"], **settings)
    put_stage(number - 1, base=wide_base)
    (whole,) = train(recipe, [number], resume=False, console=QUIET)
    kept = whole.rename(tmp_path / "whole")

    with stopping(3):
        train(recipe, [number], resume=False, console=QUIET)
    assert not whole.exists()
    train(recipe, [number], resume=True, console=QUIET)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, got = load_file(kept / name), load_file(whole / name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("targets", [["attention", "FFN", "routers"], ALL], ids=["frozen experts", "all"])
def test_a_frozen_base_in_bfloat16_changes_nothing(write_recipe, put_stage, tmp_path, stopping, monkeypatch, targets):
    """Autocast multiplies in it anyway. The run that keeps the base in float32 is the reference; the other is stopped and resumed."""
    recipe = with_adapter(write_recipe, 3, targets, ["precision=bf16", "stage3.optimisation.max_steps=4"])
    put_stage(2)
    with monkeypatch.context() as patch:
        patch.setattr(run, "cast_frozen", lambda model, adapter: None)
        (whole,) = train(recipe, [3], resume=False, console=QUIET)
    kept, dtypes = whole.rename(tmp_path / "whole"), []

    def cast(model, adapter):
        adapters.cast_frozen(model, adapter)
        dtypes.append({parameter.dtype for parameter in model.parameters()})

    monkeypatch.setattr(run, "cast_frozen", cast)
    with stopping(2):
        train(recipe, [3], resume=False, console=QUIET)
    train(recipe, [3], resume=True, console=QUIET)
    assert dtypes == [{torch.float32, torch.bfloat16}] * 2
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, got = load_file(kept / name), load_file(whole / name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("target", ["attention", "experts", "dora"])
def test_what_of_a_base_is_kept_in_bfloat16(target):
    """What learns stays in float32, and so do embeddings, norms, routers, tower and projector, and what DoRA or LoRA of stacks adds to."""
    targets = ["attention"] if target == "dora" else [target]
    sparse = upcycle(tiny_dense("phi"))
    matrices = {name for name, part in parts_of(sparse).items() if part in ("attention", "FFN", "experts")}
    model, _ = adapted(sparse, *targets, use_dora=target == "dora")
    adapters.cast_frozen(model, Adapter(targets, rank=2, use_dora=target == "dora"))
    cast = {name.replace(".base_layer", "") for name, value in sparse.named_parameters() if value.dtype == torch.bfloat16}
    expected = {"attention": matrices, "experts": {name for name in matrices if ".mlp.experts." not in name}, "dora": set()}
    assert cast == expected[target]


def test_going_on_from_an_adapter(write_recipe, put_stage, tmp_path):
    recipe = with_adapter(write_recipe)
    put_stage(2)
    (first,) = train(recipe, [3], resume=False, console=QUIET)
    adapter = str(first / "adapter")
    recipe = with_adapter(write_recipe, continue_from=adapter)
    recipe.output = str(tmp_path / "more")
    (second,) = train(recipe, [3], resume=False, console=QUIET)
    config = json.loads((second / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first / "base")
    assert not (second / "base").exists()
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert changed(before, after)
    assert max((before[name] - after[name]).abs().max() for name in before) < 0.1  # it went on, and did not begin anew

    recipe.output, recipe.stage3.adapter.rank = str(tmp_path / "other"), 3
    with pytest.raises(RecipeError, match="which has r 2, but the recipe makes it 3"):
        train(recipe, [3], resume=False, console=QUIET)
    recipe.stage3.adapter.rank, recipe.stage3.adapter.targets = 2, ["attention"]
    with pytest.raises(RecipeError, match=r"target_parameters .* but the recipe makes it None"):
        train(recipe, [3], resume=False, console=QUIET)
    recipe.stage3.adapter.continue_from = str(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"none is not a folder with adapter_config.json"):
        train(recipe, [3], resume=False, console=QUIET)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("kind", "linear"), [("nf4", Linear4bit), ("int8", Linear8bitLt)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("experts", [False, True], ids=["stacked", "quantised"])
def test_a_quantised_base(write_recipe, put_stage, wide_base, monkeypatch, kind, linear, precision, experts):
    """The linear layers of the language model are quantised, and experts if asked; all targets learn; what is left is not quantised."""
    seen = []
    attach = adapters.attach

    def spy(model, *arguments):
        seen.append(model)
        return attach(model, *arguments)

    recipe = with_adapter(write_recipe, quantisation=kind, quantise_experts=experts)
    recipe.stage2.adapter = Adapter(["attention"], quantisation=kind)
    recipe.stage3.optimisation.gradient_checkpointing = True
    recipe.precision = precision
    monkeypatch.setattr(run, "attach", spy)
    console = Console(record=True, quiet=False, file=io.StringIO(), width=300)
    put_stage(1, base=wide_base)
    two, three = train(recipe, [2, 3], resume=False, console=console)
    for model in seen:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lora_" not in name:
                quantised = ".language_model.layers." in name
                assert isinstance(module, linear) == quantised, name
    text = console.export_text()
    assert f"adapter on a base with 28 linear layers of the language model in {kind}; embeddings and the rest are not" in text
    done, rest = (" and 8 experts", "routers") if experts else ("", "experts, routers")
    assert f"adapter on a base with 22 linear layers of the language model{done} in {kind}; {rest}, embeddings and the rest" in text
    assert all(torch.isfinite(torch.tensor(line["loss"])) for folder in (two, three) for line in log(folder) if "loss" in line)
    small = load_file(three / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for name, value in small.items() if "lora_B" in name)
    assert any(".experts." in name for name in small)
    start, end = load_file(three / "base" / "model.safetensors"), load_file(three / "model.safetensors")
    assert {value.dtype for value in end.values()} == {torch.float32}
    assert start.keys() == end.keys()
    assert changed(start, end)


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_on_quantised_experts(family, kind, tmp_path, monkeypatch):
    """Both factors of each expert learn, also after an evaluation; merged, the base with its stacks computes what the unquantised base
    computes with the adapter."""
    monkeypatch.setattr(load, "load_processor", lambda path: None)
    upcycle(wide_dense(family), num_experts=2).save_pretrained(tmp_path / "base")
    settings = Adapter(ALL, rank=2, alpha=4, quantisation=kind, quantise_experts=True)
    model, _ = adapters.load_base(str(tmp_path / "base"), settings, torch.float32, None)
    model, counts = adapters.attach(model, settings, "stage3", "base")
    inputs = tiny_inputs()
    with torch.no_grad():
        model.eval()(**inputs)
    step(model.train(), inputs)
    chosen = learning(model)
    assert {name for name, value in chosen.items() if value.grad is None or not value.grad.any()} == set()
    assert sum(".experts." in name for name in chosen) == 2 * 2 * 2 * 2  # layers, experts, matrices, factors
    assert {part.split()[0] for part in counts.trained} == set(ALL)
    model.save_pretrained(tmp_path / "adapter")

    plain = load.load_model(tmp_path / "base", separate_experts=True)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**inputs).logits
        merged, _ = adapters.merge(tmp_path / "adapter", tmp_path / "base")
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=2e-5, rtol=0)
    base = load.load_model(tmp_path / "base")
    assert list(merged.state_dict()) == list(base.state_dict())
    assert merged.config.to_dict() == base.config.to_dict()


def test_merge_on_the_command_line(write_recipe, put_stage, tmp_path):
    from typer.testing import CliRunner

    from moe_llava.cli import app

    put_stage(2)
    (three,) = train(with_adapter(write_recipe), [3], resume=False, console=QUIET)
    call = CliRunner().invoke

    done = call(app, ["merge", str(three / "adapter"), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    expected, got = load_file(three / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()

    shutil.move(three / "base", tmp_path / "moved")
    adapter = str(three / "adapter")
    for arguments, message in (
        ([adapter, str(tmp_path / "merged")], "merged exists already"),
        ([adapter, str(tmp_path / "a")], "base is not a folder"),
        ([str(three), str(tmp_path / "a")], "is not a folder with adapter_config.json"),
        ([adapter, str(tmp_path / "a"), "--base", str(tmp_path / "run" / "stage2")], "does not fit"),
    ):
        done = call(app, ["merge", *arguments])
        assert done.exit_code == 2
        assert message in done.stderr
        assert not (tmp_path / "a").exists()
    assert call(app, ["merge", adapter, str(tmp_path / "a"), "--base", str(tmp_path / "moved")]).exit_code == 0


def test_an_adapter_of_a_deeper_model_is_not_merged_in_part(tmp_path, monkeypatch):
    model, _ = adapted(upcycle(tiny_dense("llama", layers=4)), *ALL)
    model.save_pretrained(tmp_path / "adapter")
    shallow = upcycle(tiny_dense("llama", layers=3))
    monkeypatch.setattr(adapters, "load_checkpoint", lambda path, dtype: (shallow, None))
    with pytest.raises(CheckpointError, match="does not fit its base"):
        adapters.merge(tmp_path / "adapter", "shallow")


# What is refused
