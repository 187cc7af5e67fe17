"""What a model does in other hands: pickled, exported, with a backend that is named when it is loaded."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from tests.conftest import tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of, shuffled_sparse


def saved_whole(model) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved_whole(model), weights_only=False),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("phi", {"use_residual": True}), ("gemma3", {"routing": "smoes"}), ("qwen3", {"moe_layers": [1]})],
)
def test_a_fresh_model_may_be_pickled(how, family, settings):
    sparse = shuffled_sparse(family, **settings)
    other = COPIES[how](sparse)
    assert type(other.model.language_model) is type(sparse.model.language_model)
    inputs = tiny_inputs()
    expected, found = (model(**inputs, labels=labels_of(inputs), output_router_logits=True) for model in (sparse, other))
    assert torch.equal(found.loss, expected.loss)
    assert len(found.router_logits) == len(expected.router_logits)


@pytest.mark.slow
def test_another_process_unpickles_a_model_that_trains(tmp_path):
    """It has built no model: what transformers notes in constructors is not there."""
    sparse = shuffled_sparse("llama").train()
    inputs = {**tiny_inputs(), "labels": labels_of(tiny_inputs())}
    torch.save((sparse, inputs), tmp_path / "model.pt")
    code = (
        f"import torch; model, inputs = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); print(model(**inputs).loss.item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(sparse(**inputs).loss.item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("phi", {"use_residual": True}),
        ("gemma2", {}),
        ("llama", {"capacity_factor": 1.0}),
        ("llama", {"routing": "modality_split"}),
        ("llama", {"routing": "smoes"}),
    ],
)
def test_the_forward_pass_may_be_exported(family, settings):
    """For prompts of any length; the number of images is fixed in LLaVA. Which tokens take which experts is not."""
    sparse = shuffled_sparse(family, **settings)
    sparse.config.text_config.use_cache = False
    auto = torch.export.Dim.AUTO
    shapes = {"input_ids": {1: auto}, "pixel_values": {}, "attention_mask": {1: auto}}
    with torch.no_grad():
        exported = torch.export.export(sparse, (), tiny_inputs(batch=3), dynamic_shapes=shapes).module()
        for inputs in (tiny_inputs(batch=3, text=5, seed=7), tiny_inputs(batch=3, text=11, seed=8)):
            torch.testing.assert_close(exported(**inputs).logits, sparse(**inputs).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm", "auto"])
@torch.no_grad()
def test_a_backend_may_be_named_at_load(family, backend, tmp_path):
    sparse = shuffled_sparse(family)
    sparse.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, experts_implementation=backend)
    loaded = [
        AutoModelForImageTextToText.from_pretrained(tmp_path, experts_implementation=backend),
        AutoModelForImageTextToText.from_pretrained(tmp_path, config=config),
        AutoModel.from_pretrained(tmp_path, experts_implementation=backend),
    ]
    expected = sparse.model(**tiny_inputs())[0]
    for model in loaded:
        inner = getattr(model, "model", model)
        assert {mlp.experts.config._experts_implementation for mlp in inner.sparse_mlps().values()} == {backend}
        torch.testing.assert_close(inner(**tiny_inputs())[0], expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_backend_is_refused_at_load(tmp_path):
    upcycle(tiny_dense("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="best_mm"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, experts_implementation="best_mm")
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config._experts_implementation == "auto"


@torch.no_grad()
def test_the_model_without_its_head_records_routers_by_the_configuration():
    sparse = shuffled_sparse("llama")
    inputs = tiny_inputs()
    assert sparse.model(**inputs).router_logits is None
    sparse.config.output_router_logits = True
    assert len(sparse.model(**inputs).router_logits) == 2
    assert len(sparse(**inputs).router_logits) == 2
    assert sparse.model(**inputs, output_router_logits=False).router_logits is None
    assert sparse(**inputs, output_router_logits=False).router_logits is None
