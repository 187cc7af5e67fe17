"""Distillation: the loss against its formula, a cache that changes nothing, runs that end the same however they went."""

import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_processor
from moe_llava.common.errors import DataError
from moe_llava.data.encoder import Encoder
from moe_llava.data.files import StoredImage
from moe_llava.data.records import Record
from moe_llava.data.store import load_records
from moe_llava.training import distil
from moe_llava.training.distil import LiveInputs, Teacher, TeacherCache, divergence, to_events
from moe_llava.training.labels import count_shared, predicted
from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from moe_llava.training.trainer import StageTrainer
from tests.conftest import in_fresh_process, tiny_config, tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of
from tests.training import killed
from tests.training.test_distributed import read_log, torchrun

QUIET = Console(quiet=True)
VOCABULARY = 99  # of the tiny models


@pytest.fixture(scope="session")
def teacher(tiny_base, tmp_path_factory):
    """A larger model with the vocabulary of the tiny base, other weights, and 9 tokens of an image where the base has 36."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    processor = AutoProcessor.from_pretrained(tiny_base / "base")
    config = tiny_config("llama", layers=6)
    config.image_token_id = processor.tokenizer.image_token_id
    config.vision_config.image_size, config.vision_config.patch_size = 48, 16
    torch.manual_seed(7)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.patch_size = 16
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def make_recipe(write_recipe, tiny_base, teacher, tmp_path):
    """A recipe whose stage III learns from the teacher; stage II has left the tiny base as it was."""

    def make(name="run", distillation=None, **settings):
        taught = {"teacher": str(teacher), "weight": 0.3, "temperature": 2.0} | (distillation or {})
        file = write_recipe(output=str(tmp_path / name), stage3__distillation=taught, **settings)
        if not (tmp_path / name / "stage2").exists():
            shutil.copytree(tiny_base / "base", tmp_path / name / "stage2")
        return file

    return make


def run(file):
    (folder,) = train(load_recipe(file), [3], resume=False, console=QUIET)
    return read_log(folder), AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def plain_divergence(teacher_NV, model_NV, temperature):
    """The formula, a label and a token at a time."""
    total = 0.0
    for teacher_V, model_V in zip(teacher_NV.tolist(), model_NV.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in logits] for logits in (teacher_V, model_V))
        p, q = [each / sum(p) for each in p], [each / sum(q) for each in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_the_formula(temperature):
    torch.manual_seed(0)
    teacher_NV, model_NV = torch.randn(5, 11) * 3, (torch.randn(5, 11) * 3).requires_grad_()
    log_p_NV = (teacher_NV / temperature).log_softmax(-1)
    found = divergence(model_NV, {"log_probs": log_p_NV}, temperature)
    assert found.item() == pytest.approx(plain_divergence(teacher_NV, model_NV, temperature), rel=1e-6)
    (gradient,) = torch.autograd.grad(found, model_NV)
    expected = ((model_NV / temperature).softmax(-1) - log_p_NV.exp()) / temperature
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-6, rtol=0)


def test_with_all_tokens_events_are_exact_and_with_fewer_the_others_are_one():
    torch.manual_seed(0)
    log_p_NV, model_NV = (torch.randn(6, 11) * 2).log_softmax(-1), (torch.randn(6, 11) * 2).requires_grad_()
    whole = divergence(model_NV, {"log_probs": log_p_NV}, 1.0)
    (gradient,) = torch.autograd.grad(whole, model_NV)
    losses = []
    for top_k in range(1, 12):
        events = to_events(log_p_NV, top_k)
        assert events["log_probs"].shape == (6, min(top_k + 1, 11))
        torch.testing.assert_close(events["log_probs"].exp().sum(-1), torch.ones(6))
        found = divergence(model_NV, events, 1.0)
        losses.append(found.item())
        (other,) = torch.autograd.grad(found, model_NV)
        assert other.isfinite().all()
    assert losses == sorted(losses)  # merging outcomes loses information
    assert losses[-1] == pytest.approx(whole.item(), rel=1e-6)
    assert losses[-2] == pytest.approx(whole.item(), rel=1e-6)  # one token is an event either way
    torch.testing.assert_close(other, gradient, atol=1e-6, rtol=0)
    merged = [log_p_NV.exp().sort(-1, descending=True), model_NV.softmax(-1)]
    order = merged[0].indices[:, :3]
    p, q = merged[0].values[:, :3], merged[1].gather(-1, order)
    p, q = (torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1) for each in (p, q))
    assert losses[2] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("tokens", [11, 14])
def test_tokens_that_only_one_of_both_models_has(tokens):
    """A teacher with fewer rows gives the others the probability 0; one with more is taken over those of the model."""
    torch.manual_seed(0)
    model_NV, teacher_NV = torch.randn(4, 13), torch.randn(4, tokens)
    cut_NV = teacher_NV[:, :13]
    q_NV, p_NV = model_NV.softmax(-1)[:, : cut_NV.shape[1]], cut_NV.softmax(-1)
    expected = (p_NV * (p_NV / q_NV).log()).sum().item()
    log_p_NV = cut_NV.log_softmax(-1)
    for taught in ({"log_probs": log_p_NV}, to_events(log_p_NV, log_p_NV.shape[1])):
        assert divergence(model_NV, taught, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_a_teacher_predicts_the_labels_row_by_row():
    dense, inputs = tiny_dense("llama"), tiny_inputs(batch=3)
    labels = labels_of(inputs)
    labels[1, -3:], labels[2] = -100, -100
    found = Teacher(dense, 2.0, VOCABULARY)({**inputs, "labels": labels})
    logits = dense(**inputs).logits[:, :-1][labels[:, 1:] != -100]
    torch.testing.assert_close(found, (logits / 2).log_softmax(-1), atol=1e-5, rtol=0)
    assert not found.requires_grad
    assert Teacher(dense, 2.0, 50)({**inputs, "labels": labels}).exp().sum(-1).tolist() == pytest.approx([1] * len(found))


@pytest.mark.parametrize(
    "settings", [{}, {"dense": True}, {"optimisation__packing": True}, {"adapter": {"targets": ["attention"], "rank": 2}}], ids=str
)
def test_the_logged_losses_add_up_and_the_first_is_that_of_the_models(make_recipe, teacher, tmp_path, settings):
    """An image has other numbers of tokens in both models, so labels are compared in their order."""
    file = make_recipe(**{f"stage3__{key}": value for key, value in settings.items()})
    lines, _ = run(file)
    recipe = load_recipe(file)
    for line in lines:
        expected = 0.7 * line["language_loss"] + 0.3 * line["distillation_loss"]
        expected += recipe.stage3.options.router_aux_loss_coef * line.get("balance_loss", 0)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    plain = make_recipe("plain", **{f"stage3__{key}": value for key, value in settings.items()})
    (folder,) = train(load_recipe(plain, ["stage3.distillation=null"]), [3], resume=False, console=QUIET)
    before = read_log(folder)
    assert "distillation_loss" not in before[0]
    assert before[0].get("language_loss", before[0]["loss"]) == pytest.approx(lines[0]["language_loss"], rel=1e-6)
    assert before[0]["grad_norm"] != pytest.approx(lines[0]["grad_norm"], rel=1e-3)


def test_the_first_step_is_the_formula_written_out(make_recipe, teacher, tiny_base, monkeypatch):
    """On both models' logits of the records of a step, which are encoded by each model's own processor alone."""
    seen = []
    compute = StageTrainer.compute_loss
    monkeypatch.setattr(
        StageTrainer,
        "compute_loss",
        lambda self, model, inputs, *rest, **more: (seen.append(inputs), compute(self, model, inputs, *rest, **more))[1],
    )
    lines, _ = run(make_recipe(stage3__dense=True))
    taught = dict(seen[0]["teacher"].items())
    own = {name: value for name, value in seen[0].items() if name != "teacher"}
    assert taught["input_ids"].shape[1] < own["input_ids"].shape[1]
    logits = []
    for folder, inputs in ((teacher, taught), (tiny_base / "base", own)):
        labels = inputs.pop("labels")
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            logits.append(model(**inputs).logits[:, :-1][labels[:, 1:] != -100])
    assert len(logits[0]) == len(logits[1])
    expected = 4 * plain_divergence(*logits, 2.0) / len(logits[0])
    assert lines[0]["distillation_loss"] == pytest.approx(expected, rel=1e-5)


def difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("dense", [False, True])
def test_a_cache_of_all_tokens_is_as_a_live_teacher_and_batches_may_be_cut(make_recipe, monkeypatch, dense):
    live_log, live = run(make_recipe("live", stage3__dense=dense))
    cached_log, cached = run(make_recipe("cached", {"top_k": VOCABULARY}, stage3__dense=dense))
    assert [line["loss"] for line in cached_log] == pytest.approx([line["loss"] for line in live_log], rel=1e-5)
    assert difference(live, cached) < 1e-5
    parts_log, _parts = run(
        make_recipe("parts", stage3__dense=dense, stage3__optimisation__per_device_batch_size=1, stage3__moe={"balance_over": "step"})
    )
    assert [line["distillation_loss"] for line in parts_log] == pytest.approx([line["distillation_loss"] for line in live_log], rel=1e-3)
    assert parts_log[0]["distillation_loss"] == pytest.approx(live_log[0]["distillation_loss"], rel=1e-6)


def test_the_cache_is_filled_once_and_serves_the_baseline_too(make_recipe, tmp_path, monkeypatch):
    loaded = []
    load = distil.load_teacher
    monkeypatch.setattr(distil, "load_teacher", lambda *arguments: (loaded.append(1), load(*arguments))[1])
    run(make_recipe(distillation={"top_k": 8}))
    entries = sorted((tmp_path / "run" / "teacher").rglob("*.safetensors"))
    assert len(entries) == 24
    assert len(loaded) == 1
    entry = load_file(entries[0])
    number = len(entry["labels"])
    assert {name: tuple(value.shape) for name, value in entry.items()} == {
        "labels": (number,),
        "ids": (number, 8),
        "log_probs": (number, 9),
    }
    run(make_recipe(distillation={"top_k": 8}, stage3__dense=True))
    assert len(loaded) == 1
    entries[3].unlink()
    before = [file.read_bytes() for file in entries if file.exists()]
    shutil.rmtree(tmp_path / "run" / "dense")
    run(make_recipe(distillation={"top_k": 8}, stage3__dense=True))
    assert len(loaded) == 2
    assert entries[3].is_file()
    assert before == [file.read_bytes() for file in entries if file != entries[3]]
    shutil.rmtree(tmp_path / "run" / "dense")
    run(make_recipe(distillation={"top_k": 8, "temperature": 1.0}, stage3__dense=True))
    assert len(loaded) == 3
    shutil.rmtree(tmp_path / "run" / "dense")
    entries[3].write_bytes(entries[3].read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{entries[3]} is no whole entry of a cache"):
        run(make_recipe(distillation={"top_k": 8}, stage3__dense=True, stage3__optimisation__max_steps=7))


@pytest.mark.parametrize("name", ["table.parquet", "table/data/part.arrow"])
def test_an_entry_is_of_one_version_of_a_table(tmp_path, name):
    """A Parquet file, or a file in a folder of `datasets`, which is looked at once in a run."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    table, names = tmp_path / name.split("/")[0], []
    record = Record("row 0", (("What?", "That."),), (StoredImage(table, 0, 0),))
    for content in (b"a table", b"another table"):
        file.write_bytes(content)
        cache = TeacherCache(tmp_path / "cache", 8, 99)
        names.append(cache.file_of(record))
        file.unlink()
        assert cache.file_of(record) == names[-1]
    assert names[0] != names[1]


@pytest.mark.parametrize("settings", [{}, {"top_k": 8}], ids=["live", "cached"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(make_recipe, tmp_path, stopping, settings):
    file = make_recipe(
        distillation=settings, logging_steps=2, stage3__optimisation__max_steps=5, stage3__optimisation__per_device_batch_size=2
    )
    lines, expected = run(file)
    shutil.rmtree(tmp_path / "run" / "stage3")
    if settings:  # killed while the cache is filled, too
        for entry in sorted((tmp_path / "run" / "teacher").rglob("*.safetensors"))[::2]:
            entry.unlink()
    with stopping(3):
        run(file)
    (folder,) = train(load_recipe(file), [3], resume=True, console=QUIET)
    found = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("loss", "language_loss", "distillation_loss"):
        assert [line[name] for line in read_log(folder)] == [line[name] for line in lines]


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), {"top_k": 8}], ids=["live", "cached"])
def test_two_processes_do_what_one_does(make_recipe, tmp_path, settings):
    moe = {"router_bias_rate": 0.01}
    lines, expected = run(make_recipe("one", settings, stage3__moe=moe))
    torchrun("train", make_recipe("two", settings, stage3__moe=moe, stage3__optimisation__per_device_batch_size=2), "--stage", "3")
    found = read_log(tmp_path / "two" / "stage3")
    for name in ("loss", "language_loss", "distillation_loss"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in lines], abs=1e-5)
    assert difference(expected, AutoModelForImageTextToText.from_pretrained(tmp_path / "two" / "stage3").state_dict()) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"top_k": 8}], ids=["live", "cached"])
def test_a_record_that_cannot_be_read_is_left_out_or_stops_the_run(make_recipe, tiny_base, tmp_path, settings):
    source = tiny_base / "data"
    shutil.copytree(source / "images", tmp_path / "images")
    records = json.loads((source / "train.json").read_text())
    (tmp_path / "images" / records[0]["image"]).write_bytes(b"no picture")
    broken = sum(record.get("image") == records[0]["image"] for record in records)
    data = {"file": str(source / "train.json"), "images": str(tmp_path / "images")}
    more = {"stage3__data": data, "stage3__optimisation__max_steps": -1, "stage3__optimisation__epochs": 1.0}
    with pytest.raises(DataError, match=r"train\.json"):
        run(make_recipe("stop", settings, **more))
    lines, _ = run(make_recipe("skip", settings, on_bad_record="skip", **more))
    assert lines[-1]["skipped"] == broken


def test_a_record_that_is_cut_for_the_model_is_taught_as_far_as_it_goes(teacher, tiny_base, tmp_path):
    """The teacher reads it as a whole, and gets another number of tokens for the image."""
    record = load_records(tiny_base / "data" / "train.json", tiny_base / "data" / "images")[0]
    processor, theirs = load_processor(tiny_base / "base"), Encoder(load_processor(teacher))
    whole = Encoder(processor)(record)["labels"]
    last = int((whole != -100).nonzero()[-1])
    labels = Encoder(processor, max_length=last)(record)["labels"]
    number = len(predicted(labels))
    assert 0 < number < len(predicted(whole))
    item = LiveInputs(theirs)(record, labels)
    assert predicted(item["labels"]).tolist() == predicted(labels).tolist()
    model = Teacher(AutoModelForImageTextToText.from_pretrained(teacher).eval(), 2.0, VOCABULARY)
    cache = TeacherCache(tmp_path, VOCABULARY, VOCABULARY)
    cache.fill([record], theirs, lambda: model, skip=False)
    events = cache(record, labels)
    assert events["log_probs"].shape == (number, VOCABULARY)
    live = model(LiveInputs(theirs).collate([item]))
    torch.testing.assert_close(events["log_probs"], live.gather(-1, events["ids"].long()), atol=1e-5, rtol=0)
    with pytest.raises(DataError, match="label 0 of its answers is token"):
        cache(record, labels.where(labels == -100, labels + 1))
    (tmp_path / "moved").mkdir()
    with pytest.raises(DataError, match="the cache of the teacher has no"):
        TeacherCache(tmp_path / "moved", VOCABULARY, VOCABULARY)(record, labels)


def test_labels_are_compared_in_their_order():
    own = torch.tensor([5, 6, 7])
    assert count_shared(own, torch.tensor([5, 6, 7, 8]), "record 1", "the teacher") == 3  # the model's were cut
    with pytest.raises(DataError, match="record 1: label 1 of its answers is token 6 to the model, but token 9 to the teacher"):
        count_shared(own, torch.tensor([5, 9, 7]), "record 1", "the teacher")
    with pytest.raises(DataError, match="record 1: label 2 of its answers is token 7 to the model, but the teacher has only 2 labels"):
        count_shared(own, torch.tensor([5, 6]), "record 1", "the teacher")


def test_a_sparse_model_may_teach(make_recipe, tiny_base, tmp_path):
    upcycle(AutoModelForImageTextToText.from_pretrained(tiny_base / "base"), expert_start="noise").save_pretrained(tmp_path / "sparse")
    from moe_llava import MoeLlavaProcessor

    MoeLlavaProcessor.from_llava(AutoProcessor.from_pretrained(tiny_base / "base")).save_pretrained(tmp_path / "sparse")
    lines, _ = run(make_recipe(distillation={"teacher": str(tmp_path / "sparse")}))
    assert lines[0]["distillation_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"top_k": 8}], ids=["live", "cached"])
def test_a_run_that_was_killed_at_some_of_its_file_operations(make_recipe, put_stage, tmp_path, settings):
    """The first of a cache's operations are among the first of all."""
    file = make_recipe(distillation=settings, logging_steps=100)
    (tmp_path / "before").mkdir()
    put_stage(2, tmp_path / "before")
    in_fresh_process(killed.main, file, 3, tmp_path, 9, 40, -3)


@pytest.mark.slow
def test_a_sharded_model_learns_from_a_whole_teacher(make_recipe, tmp_path):
    lines, _ = run(make_recipe("one"))
    sharding = {"sharding": {"fsdp_size": 2, "ep_size": 2}}
    torchrun("train", make_recipe("two", stage3__optimisation__per_device_batch_size=2, **sharding), "--stage", "3")
    found = read_log(tmp_path / "two" / "stage3")
    for name in ("loss", "language_loss", "distillation_loss"):
        assert [line[name] for line in found][:2] == pytest.approx([line[name] for line in lines][:2], abs=1e-4), name


@pytest.mark.parametrize("settings", [{}, {"top_k": VOCABULARY}], ids=["live", "cached"])
def test_in_bfloat16_the_losses_are_about_the_same(make_recipe, settings):
    expected, _ = run(make_recipe("fp32", settings))
    found, _ = run(make_recipe("bf16", settings, precision="bf16"))
    assert found[0]["distillation_loss"] == pytest.approx(expected[0]["distillation_loss"], rel=0.05)
