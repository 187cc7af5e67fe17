"""Which model types can be upcycled: the page, the command, and what upcycle does."""

import json
import os
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_llava import upcycle
from moe_llava.checkpoints.supported import CAN, CANNOT, MOE, UNKNOWN, list_support, summary, support_of
from moe_llava.model.ffn import GATED
from moe_llava.model.moe import GatedExperts
from moe_llava.model.options import MoeOptions
from moe_llava.model.upcycling import copy_into_experts
from tests.conftest import REPOSITORY, refused, run_here
from tests.vlm import FAMILIES

PAGE = REPOSITORY / "docs" / "families.md"
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
UPDATE = "UPDATE_FAMILIES=1 pytest tests/checkpoints/test_supported.py"


@pytest.fixture(scope="module")
def rows():
    return list_support()


def table(rows):
    lines = [f"{summary(rows)}.", "", "| model type | class | status | reason |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| `{row.model_type}` | {row.class_name} | {row.status} | {row.reason} |" for row in rows)])


def test_the_page_is_what_building_each_model_shows(rows):
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    expected = f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"
    if os.environ.get("UPDATE_FAMILIES"):
        PAGE.write_text(expected, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == expected, f"{PAGE} is out of date. This writes it anew: {UPDATE}"


def test_the_page_names_the_tested_families(rows):
    head, _ = PAGE.read_text(encoding="utf-8").split(BEGIN)
    named = [name for line in re.findall(r"^\| (`.*?) \|", head, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)]
    assert sorted(named) == sorted(FAMILIES)
    status = {row.model_type: row.status for row in rows}
    assert {status[name] for name in FAMILIES} == {CAN}


# Types whose default configuration builds no whole model: the backbone was examined, or they were refused by class and configuration.
NOT_WHOLE = {"aya_vision", "fast_vlm", "gemma3n", "perception_lm", "chameleon", "emu3", "diffusion_gemma"}


@pytest.mark.slow
def test_upcycle_does_as_the_list_says(rows):
    """Whole models without weights: the same status, and the same reason."""
    assert {row.status for row in rows} == {CAN, MOE, CANNOT, UNKNOWN}
    for row in rows:
        if row.status == UNKNOWN or row.model_type in NOT_WHOLE:
            continue
        with torch.device("meta"):
            model = getattr(transformers, row.class_name)(AutoConfig.for_model(row.model_type))
        if row.status == CAN:
            experts = {type(mlp.experts).__name__ for mlp in upcycle(model).sparse_mlps().values()}
            assert row.reason == ", ".join(sorted(experts)), row.model_type
            continue
        with pytest.raises(ValueError) as error:
            upcycle(model)
        assert (row.reason in str(error.value), "sparse already" in str(error.value)) == (True, row.status == MOE), row.model_type


def test_the_same_parameters_used_differently_cannot(monkeypatch):
    """On the meta device only names and shapes can be compared, so an FFN is tried with weights of its own."""
    assert support_of("llava").status == CAN
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x).clamp(max=500))
    found = support_of("llava")
    assert (found.status, found.reason) == (CANNOT, "LlamaMLP has the parameters of GatedExperts, but computes something else")


def test_gemma3n_is_refused_with_weights_too(rows):
    """Its first layers leave out most of the gate."""
    config = AutoConfig.for_model("gemma3n").text_config
    config.hidden_size, config.intermediate_size = 16, [32] * config.num_hidden_layers
    ffn = Gemma3nTextMLP(config, layer_idx=0)
    for parameter in ffn.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="computes something else"):
        copy_into_experts([ffn], GatedExperts(MoeOptions(), 16, 32, getattr(ffn, GATED.activation)))
    assert {row.model_type: row.status for row in rows}["gemma3n"] == CANNOT


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen3_vl_moe", "error: Qwen3VLMoeForConditionalGeneration is sparse already, its layers have experts"),
        ("t5gemma2", "error: upcycle takes a vision-language model, but the configuration of T5Gemma2ForConditionalGeneration has no"),
        ("kosmos-2", "error: Kosmos2TextBlock has no module 'mlp' that experts could replace"),
    ],
)
def test_the_verb_upcycle_refuses_before_it_reads_weights(model_type, message, tmp_path):
    """The folder has none."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    done = run_here("upcycle", tmp_path, tmp_path / "out")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert done.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_the_command():
    found = run_here("families", "qwen3_vl")
    assert found.exit_code == 0, found.output
    assert re.search(r"qwen3_vl .* Qwen3VLForConditionalGeneration .* can be upcycled .* GatedExperts", found.stdout)
    assert json.loads(run_here("families", "aria", "--json").stdout) == {
        "aria": {"class": "AriaForConditionalGeneration", "status": "already MoE", "reason": "its layers have experts"}
    }
    assert "transformers has no vision-language model of type 'qwen3vl'; did you mean qwen3_vl?" in refused("families", "qwen3vl")
