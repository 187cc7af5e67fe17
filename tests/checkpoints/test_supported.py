"""Which model types can be upcycled: the page, the command, and what upcycle does."""

import os

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.checkpoints.supported import CAN, CANNOT, MOE, list_support, summary
from tests.conftest import REPOSITORY, refused, run_here

PAGE = REPOSITORY / "docs" / "families.md"
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"


@pytest.fixture(scope="module")
def rows():
    return list_support()


def table(rows):
    lines = [f"{summary(rows)}.", "", "| model type | class | status | reason |", "|---|---|---|---|"]
    reasons = {CAN: "", MOE: "", CANNOT: ""}
    for row in rows:
        reason = (reasons[row.status] or row.reason).replace("|", "/")
        lines.append(f"| `{row.model_type}` | {row.class_name} | {row.status} | {reason} |")
    return "\n".join(lines)


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the page is about transformers 5.23.0")
def test_the_page_is_what_building_each_model_shows(rows):
    """`UPDATE_FAMILIES=1 pytest tests/checkpoints/test_supported.py` writes it anew."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    expected = f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"
    if os.environ.get("UPDATE_FAMILIES"):
        PAGE.write_text(expected)
    assert PAGE.read_text() == expected, "docs/families.md is out of date: see this test"


def test_upcycle_does_as_the_list_says(rows):
    """On the meta device, with every type whose default configuration builds a whole model."""
    seen = {CAN: 0, MOE: 0, CANNOT: 0}
    for row in rows:
        if "builds no model" in row.reason:
            continue
        try:
            config = AutoConfig.for_model(row.model_type)
            for part in (config.get_text_config(), getattr(config, "vision_config", None)):
                if getattr(part, "num_hidden_layers", None) and not getattr(part, "layer_types", None):
                    part.num_hidden_layers = 4
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError):
            continue  # the list was made from its backbone
        try:
            upcycle(model, moe_layers=[0])
            status = CAN
        except TypeError:
            status = CANNOT
        except ValueError as error:
            status = MOE if "is sparse already" in str(error) else CANNOT
        except NotImplementedError:
            status = CAN  # everything is checked before weights are copied, which tensors without data cannot be
        assert (row.model_type, status) == (row.model_type, row.status)
        seen[status] += 1
    assert seen[CAN] >= 40
    assert seen[MOE] >= 10


def test_the_command():
    found = run_here("families", "qwen3_vl")
    assert found.exit_code == 0, found.output
    assert "can be upcycled" in found.stdout
    assert "did you mean qwen3_vl?" in refused("families", "qwen3vl")
