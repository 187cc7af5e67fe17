"""The model card, and the upload of a checkpoint to a stand-in of the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.checkpoints.processors import sparse_processor
from moe_llava.evaluation.ask.contents import checkpoint_digests
from moe_llava.evaluation.score.benchmark import find_benchmark
from tests.conftest import refused, run_here
from tests.evaluation.hub import hub
from tests.training.conftest import tiny_base  # noqa: F401

OPTIMISATION = {"learning_rate": 1e-5, "batch_size": 1, "per_device_batch_size": 1}


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("saved") / "model"
    dense, processor = load_checkpoint(tiny_base / "base")
    upcycle(dense, num_experts=4).save_pretrained(folder)
    sparse_processor(processor).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_a_card_of_an_upcycled_model(folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    done = run_here("card", folder, "--base", base)
    assert done.exit_code == 0, done.output
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("apache-2.0", None, "transformers")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "upcycled from `base`" in card.text
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert "| `num_experts` | 4 |" in card.text
    assert "trust_remote_code=True" in card.text
    assert run_here("card", folder).exit_code == 0  # it replaces its own
    assert "The licence of the base is not known to this card" in (folder / "README.md").read_text()


def test_a_card_of_a_stage_with_results(folder, tmp_path):
    stage = folder.rename(tmp_path / "stage3")
    data = {"data": {"file": "/data/instructions.json", "images": "/data"}, "optimisation": OPTIMISATION}
    (stage / "recipe.yaml").write_text(yaml.safe_dump({"model": "org/dense-vlm", "output": "runs", "stage3": data}))
    (stage / "records.json").write_text(json.dumps({"records": 1234, "digest": "0"}))
    results = tmp_path / "evaluation" / "pope"
    results.mkdir(parents=True)
    found = {"benchmark": "pope", "model": str(stage), "questions": 300, "missing": []}
    scores = dict.fromkeys(find_benchmark("pope").headline, 0.8125)
    (results / "result.json").write_text(json.dumps(found | {"scores": scores, "intervals": {name: [0.7, 0.9] for name in scores}}))
    settings = {"checkpoint": str(stage), "checkpoint_files": checkpoint_digests(str(stage))}
    (results / "settings.json").write_text(json.dumps(settings))
    done = run_here("card", stage, "--results", results.parent)
    assert done.exit_code == 0, done.output
    card = ModelCard.load(stage / "README.md")
    assert card.data.base_model == ["org/dense-vlm"]
    assert "Stage 3 of MoE-Tuning, on 1,234 records:" in card.text
    assert "- `instructions.json`" in card.text
    assert any(result.dataset_type == "pope" for result in card.data.eval_results)
    assert "70.00 to 90.00 | 300 |" in card.text
    (results / "settings.json").write_text(json.dumps(settings | {"perturbation": {"name": "noise", "strength": 1}}))
    assert "holds results of perturbed questions" in refused("card", stage, "--results", results.parent)
    (results / "settings.json").write_text(json.dumps(settings | {"checkpoint_files": {"model.safetensors": "0"}}))
    assert "whose files differ from those in" in refused("card", stage, "--results", results / "result.json")


def test_mistakes_are_reported(folder, tmp_path):
    (folder / "README.md").write_text("# By hand\n")
    assert "was not written by this command" in refused("card", folder)
    (folder / "README.md").unlink()
    assert run_here("card", folder).exit_code == 0
    card = (folder / "README.md").read_text()
    for edited in (card.replace("# model", "# My model"), card + "More.\n"):
        (folder / "README.md").write_text(edited)
        assert "or edited since" in refused("card", folder)
        assert (folder / "README.md").read_text() == edited
    (folder / "README.md").unlink()
    assert "has no BENCHMARK/result.json" in refused("card", folder, "--results", tmp_path)
    assert not (folder / "README.md").exists()


PUSH = """
import sys
from huggingface_hub import upload_folder
from transformers import AutoModelForImageTextToText, AutoProcessor
import moe_llava
if sys.argv[2] == "parts":
    AutoModelForImageTextToText.from_pretrained(sys.argv[1]).push_to_hub("me/model")
    AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub("me/model")
else:
    upload_folder(repo_id="me/model", folder_path=sys.argv[1])
"""


@pytest.mark.parametrize("way", ["parts", "folder"])
def test_a_pushed_checkpoint_loads_without_the_package(folder, tmp_path, way):
    run_here("card", folder, "--base", "org/dense-vlm", "--license", "mit")
    with hub() as server:
        address = f"http://127.0.0.1:{server.server_port}"
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", PUSH, folder, way], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    received = tmp_path / "received"
    for name, content in server.files.items():
        file = received / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert {"config.json", "model.safetensors", "modeling.py", "processing.py", "tokenizer.json"} <= server.files.keys()
    if way == "folder":
        assert ModelCard.load(received / "README.md").data.license == "mit"
    model = AutoModelForImageTextToText.from_pretrained(received)
    expected = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    code = "import sys; from transformers import AutoProcessor; AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)"
    assert subprocess.run([sys.executable, "-c", code, received], cwd=Path(tmp_path), capture_output=True).returncode == 0
