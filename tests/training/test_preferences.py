"""DPO with TRL, by the script of docs/preferences.md: its loss against the formula (arXiv 2305.18290, equation 7), and what it trains."""

import math
import os
import re
import runpy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.digits.dataset import write_dataset
from moe_llava.model.losses import balance_loss
from tests.conftest import REPOSITORY, run_here
from tests.families.processors import tiny_checkpoint

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
BETA, ALPHA = 0.1, 0.3
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": [],
    "max_length": None,
    "max_steps": 2,
    "learning_rate": 1e-3,
}


def write_sparse(dense, out, **options):
    """Upcycle a checkpoint, with routers that prefer some experts."""
    model, processor = load_checkpoint(dense)
    sparse = upcycle(model, router_aux_loss_coef=ALPHA, **options)
    torch.manual_seed(1)
    for mlp in sparse.sparse_mlps().values():
        torch.nn.init.normal_(mlp.router.weight, std=0.3)
    sparse.save_pretrained(out)
    processor.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def script(tiny_base, tmp_path_factory):
    """The folder in which the script has run for two steps, and its names."""
    folder = tmp_path_factory.mktemp("preferences")
    write_dataset(folder / "runs" / "demo" / "data", train_images=60, test_images=2)
    write_sparse(tiny_base / "base", folder / "runs" / "demo" / "stage3")
    page = (REPOSITORY / "docs" / "preferences.md").read_text(encoding="utf-8")
    (folder / "script.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder, runpy.run_path("script.py")
    finally:
        os.chdir(before)


def log_probs(model, batch):
    """Return the log probability of each row's answer, and the outputs of the model."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    outputs = model(**inputs, output_router_logits=True)
    log_probs_BS = outputs.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (log_probs_BS * batch["completion_mask"][:, 1:]).sum(-1), outputs


def formula(model, reference, batch):
    policy_B, outputs = log_probs(model, batch)
    with torch.no_grad():
        reference_B, _ = log_probs(reference, batch)
    chosen_B, rejected_B = (policy_B - reference_B).chunk(2)
    preference = -F.logsigmoid(BETA * (chosen_B - rejected_B)).mean()
    return preference + chosen_loss(policy_B, batch) + ALPHA * outputs.aux_loss


def chosen_loss(log_probs_B, batch):
    """Return the cross entropy of the chosen answers, the mean over their tokens."""
    return -log_probs_B.chunk(2)[0].sum() / batch["completion_mask"].chunk(2)[0].sum()


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_loss_and_gradients_are_those_of_the_formula(script):
    folder, names = script
    trainer = names["trainer"]
    assert trainer.state.global_step == 2
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[0] == len(batch["input_ids"])
    reference, _ = load_checkpoint(folder / "runs" / "demo" / "stage3")
    saved, _ = load_checkpoint(folder / "runs" / "dpo")
    trained = trainer.model.train()
    loss, expected = trainer.compute_loss(trained, batch), formula(saved, reference, batch)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    found, wanted = gradients(loss, trained), gradients(expected, saved)
    assert {name for name in found if not found[name].any()} == set()
    assert all(".mlp.experts." in name or ".mlp.router." in name for name in found)
    assert sum(".mlp.router." in name for name in found) == 2
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-4)


def test_only_experts_and_routers_have_changed(script):
    folder, _ = script
    before, after = (load_checkpoint(folder / "runs" / name)[0].state_dict() for name in ("demo/stage3", "dpo"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp.experts." in name or ".mlp.router." in name}


def test_the_saved_model_is_evaluated(script):
    done = run_here("evaluate", "runs/dpo", "--benchmark", "digits", "--data", "runs/demo/data", "--out", "runs/answers", "--limit", "6")
    assert done.exit_code == 0, done.output
    assert len((script[0] / "runs" / "answers" / "digits" / "answers.jsonl").read_text().splitlines()) == 6


def test_pairs_are_right_and_wrong_answers(script):
    pairs = script[1]["pairs"]
    assert {pair["chosen"][0]["content"] for pair in pairs} == {"yes", "no"}
    for pair in pairs:
        assert pair["prompt"][0]["content"].startswith("is there a ")
        assert {pair["chosen"][0]["content"], pair["rejected"][0]["content"]} == {"yes", "no"}


def fresh_trainer(script, checkpoint="runs/demo/stage3", **others):
    """A trainer of the script's class, before its first step; TRL's own loss of the routers with `router_aux_loss_coef`."""
    folder, names = script
    model, processor = load_checkpoint(checkpoint)
    coefficient = others.pop("router_aux_loss_coef", 0)
    settings = SETTINGS | {"router_aux_loss_coef": coefficient, "loss_type": others.pop("loss_type", ["sigmoid", "sft"])}
    arguments = trl.DPOConfig(str(folder / "out"), logging_steps=1, **settings)
    kind = others.pop("kind", names["SparseDPOTrainer"])
    data = names["trainer"].train_dataset
    return kind(model=model, args=arguments, train_dataset=data, processing_class=processor, **others)


OPTIONS = [{}, {"granularity": 2}, {"balance_over": "sequence"}, {"routing": "modality_split"}, {"routing": "smoes"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_before_the_first_step_it_is_log_2_and_the_balance_loss(options, script, tiny_base, tmp_path):
    checkpoint = write_sparse(tiny_base / "base", tmp_path / "sparse", **options)
    trainer = fresh_trainer(script, checkpoint)
    batch = next(iter(trainer.get_train_dataloader()))
    log_probs_B, outputs = log_probs(load_checkpoint(checkpoint)[0], batch)
    assert outputs.aux_loss.item() > 2.05  # two layers
    expected = math.log(2) + chosen_loss(log_probs_B, batch).item() + ALPHA * outputs.aux_loss.item()
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(expected, abs=1e-6)


def test_an_adapter_is_trained_and_merged(script):
    """On attention and on experts. The reference is the model without the adapter."""
    peft = pytest.importorskip("peft")
    layers = r"model\.language_model\.layers\.\d+\."
    model, _ = load_checkpoint("runs/demo/stage3")
    experts = [name for name, _ in model.named_parameters() if ".mlp.experts." in name]
    config = peft.LoraConfig(r=4, target_modules=layers + r"self_attn\.(q_proj|v_proj)", target_parameters=experts)
    trainer = fresh_trainer(script, peft_config=config)
    assert trainer.ref_model is None
    start = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if ".lora_" in name}
    first = next(entry for entry in trainer.state.log_history if entry.get("step") == 1)
    assert first["rewards/margins"] == 0
    assert first["loss"] > math.log(2) + 2.1 * ALPHA
    trainer.save_model("runs/adapter")
    assert run_here("merge", "runs/adapter", "runs/merged").exit_code == 0
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), batch).item()
    merged, reference = (load_checkpoint(name)[0] for name in ("runs/merged", "runs/demo/stage3"))
    assert loss == pytest.approx(formula(merged, reference, batch).item(), abs=2e-6)


def test_trls_own_loss_is_counted_once(script):
    """With TRL's trainer itself: its formula is that of Mixtral in transformers."""
    trainer = fresh_trainer(script, kind=trl.DPOTrainer, router_aux_loss_coef=None, loss_type="sigmoid")
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = log_probs(load_checkpoint("runs/demo/stage3")[0], batch)[1]
    pooled = load_balancing_loss_func(outputs.router_logits, 4, 2, batch["attention_mask"]).item()
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(math.log(2) + ALPHA * pooled, abs=1e-6)


def test_trls_own_loss_misses_layers_that_use_different_experts():
    """If this fails, it adds up layers no more, and the script needs no trainer of its own."""
    favourites = torch.tensor([[5.0, 4.0, 0.0, 0.0], [0.0, 0.0, 5.0, 4.0]])
    logits = tuple((favourite_E + 0.1 * torch.randn(400, 4)).requires_grad_() for favourite_E in favourites)
    pooled, ours = load_balancing_loss_func(logits, 4, 2), balance_loss(logits)
    assert pooled.item() == pytest.approx(2, abs=1e-3)  # k, as with an even load
    assert ours.item() > 2 * 2.8
    assert all(gradient.abs().max() < 1e-5 for gradient in torch.autograd.grad(pooled, logits))
    assert all(gradient.abs().max() > 1e-4 for gradient in torch.autograd.grad(ours, logits))


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "idefics3"])
def test_inputs_of_other_families_reach_the_model(family, script, tmp_path):
    tiny_checkpoint(family, tmp_path / "dense")
    model, processor = load_checkpoint(write_sparse(tmp_path / "dense", tmp_path / "sparse"))
    words = {"prompt": "What is it?", "chosen": "A cat", "rejected": "A big dog"}
    pair = {key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in words.items()}
    data = Dataset.from_list([{"images": [Image.new("RGB", (40, 32), colour)], **pair} for colour in ("red", "blue")])
    arguments = trl.DPOConfig(str(tmp_path / "out"), router_aux_loss_coef=0, loss_type=["sigmoid", "sft"], **SETTINGS)
    trainer = script[1]["SparseDPOTrainer"](model, args=arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    expected = formula(model.eval(), load_checkpoint(tmp_path / "sparse")[0], batch).item()
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, abs=1e-6)
