"""Vision-language models with experts of their own are traced, evaluated, served, and trained in stage III without being upcycled."""

import json
import os
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint, load_on_meta
from moe_llava.data.encoder import EXPERT_TYPES, Encoder
from moe_llava.data.records import Record
from moe_llava.evaluation.ask.generate import answer
from moe_llava.evaluation.score.questions import Question
from moe_llava.routing.routers import check_routers, find_routers, layer_index, routed_experts
from moe_llava.routing.routes import write_routes
from moe_llava.routing.statistics import RoutingStatistics
from moe_llava.routing.tokens import RoutingError
from moe_llava.routing.trace import trace_answer, trace_routing
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prompt import PromptBuilder
from moe_llava.serving.engine.requests import Request
from moe_llava.training import native
from moe_llava.training.budget import active_parameters, survey
from moe_llava.training.native import numbers, recorded
from moe_llava.training.parts import parts_of
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.conftest import REPOSITORY
from tests.families.native import CONFIGS, SPARSE, native_checkpoint
from tests.families.test_training import check_same_weights, data, write_recipe  # noqa: F401
from tests.serving.conftest import server
from tests.serving.hostile import PNG, data_url
from tests.serving.test_api import post
from tests.training.conftest import stopping  # noqa: F401
from tests.training.test_distributed import read_log

QUIET = Console(quiet=True)
FAMILIES = sorted(CONFIGS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny models by family, made when first needed."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = native_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture
def write_native(checkpoints, write_recipe):  # noqa: F811
    def write(family, **settings):
        return write_recipe(family, **{"model": str(checkpoints(family)), "stage3__moe": None, **settings})

    return write


def prompt_of(processor, text="What?"):
    image = Image.new("RGB", (40, 30), (200, 90, 20))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return PromptBuilder(processor).build(messages, [image]), image


def completions(engine, prompts, limit=5):
    """Return the tokens of each prompt's completion, all in one batch."""
    pieces = [queue.Queue() for _ in prompts]
    for prompt, own in zip(prompts, pieces, strict=True):
        engine.submit(Request(prompt, limit), own.put)
    engine.close()
    return [[own.get().token for _ in range(own.qsize())] for own in pieces]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_served_and_evaluated(family, checkpoints, tmp_path):
    """The engine writes what `generate` writes, alone and in a batch, and so does an evaluation."""
    model, processor = load_checkpoint(checkpoints(family))
    Encoder(processor).check_processor()
    prompts = [prompt_of(processor, text)[0] for text in ("What?", "What is in the picture?")]
    greedy = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = model.generate(input_ids=torch.tensor([prompt.input_ids]), **prompt.inputs, max_new_tokens=5, do_sample=False)
        greedy.append(ids[0, len(prompt.input_ids) :].tolist())
    assert completions(Engine(model, processor.tokenizer), prompts) == greedy
    prompt_of(processor)[1].save(tmp_path / "a.png")
    ((pair,),) = answer(model, processor, [Question("a", "What?", (tmp_path / "a.png",))], 1, 5)
    assert pair[1] == processor.tokenizer.decode(greedy[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_router_per_sparse_layer_is_traced(family, checkpoints, tmp_path):
    model, processor = load_checkpoint(checkpoints(family))
    assert tuple(layer_index(name) for name in find_routers(model)) == SPARSE[family]
    prompt, _ = prompt_of(processor)
    trace = trace_answer(model, processor.tokenizer, prompt.input_ids, [5, 6], prompt.inputs)
    assert trace.layers == SPARSE[family]
    assert trace.answer_T.sum() == 2
    assert trace.places_T3[:, 0].max() == 0
    # The projector of Aria sends queries to the whole image: its features have no place in it.
    assert trace.pictures == ([] if family == "aria" else [0])
    prompt_of(processor)[1].save(tmp_path / "a.png")
    record = Record("a record", (("<image>\nWhat?", "A picture."),), (tmp_path / "a.png",))
    (tmp_path / "out").mkdir()
    write_routes(tmp_path / "out", family, model, processor, [record], 1, None)
    drawn = sorted(file.name for file in (tmp_path / "out" / "examples").glob("*.png"))
    assert drawn == (["00-answer.png"] if family == "aria" else ["00-answer.png", "00-patches.png"])
    image = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "A picture."}]
    with server(Engine(model, processor.tokenizer), processor) as url:
        status, _, body = post(url, {"model": "tiny", "messages": messages}, path="/routes")
    assert (status, len(json.loads(body)["images"])) == (200, len(trace.pictures))


def test_routers_of_text_and_of_images_are_traced_as_one(checkpoints):
    """The experts of text come first. Compared with the logits that transformers records, in a batch with padding and in an answer, whose
    tokens are text."""
    model, processor = load_checkpoint(checkpoints("ernie4_5_vl_moe"))
    image = Image.new("RGB", (40, 30), (200, 90, 20))
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages in (ask, [{"role": "user", "content": "Hi"}])]
    inputs = processor(text=texts, images=[[image], []], padding=True, padding_side="left", return_tensors="pt")
    kept = inputs["attention_mask"].bool()
    is_image = inputs["moe_mm_token_type_ids"][kept] != 0
    with torch.no_grad():
        recorded = model(**inputs, output_router_logits=True, use_cache=False).router_logits
    for answer_length in (None, 4):
        trace = trace_routing(model, inputs, max_new_tokens=answer_length)
        prompt = ~trace.answer_T
        assert (answer_length is None) == bool(prompt.all())
        for probs_TE, ids_TK, logits in zip(trace.probs_LTE, trace.ids_LTK, recorded, strict=True):
            expected = logits.view(*kept.shape, 4)[kept].softmax(-1)
            own = torch.where(is_image[:, None], probs_TE[prompt, 4:], probs_TE[prompt, :4])
            assert torch.allclose(own, expected, atol=1e-6)
            assert torch.equal(ids_TK[prompt] >= 4, is_image[:, None].expand(-1, 2))
            assert (ids_TK[~prompt] < 4).all()
            assert torch.allclose(probs_TE.sum(-1), torch.ones(len(probs_TE)))
    statistics = RoutingStatistics()
    statistics.add(trace)
    assert json.dumps(statistics.summary(), allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_3_trains_experts_and_routers_alone(family, checkpoints, write_native, capsys):
    """The shared experts, and biases that are not trained by gradients, stay as they are, too."""
    recipe = load_recipe(write_native(family, stage3__optimisation__gradient_checkpointing=True))
    console = Console(width=200)
    (folder,) = train(recipe, [3], False, console)
    before, _ = load_checkpoint(checkpoints(family), dtype=torch.float32)
    after, _ = load_checkpoint(folder)
    assert type(after) is type(before)
    states, parts = before.state_dict(), parts_of(after)
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, states[name])}
    expected = {name for name, part in parts.items() if part in ("experts", "router") and not name.endswith("correction_bias")}
    # The last layer's experts for images see only tokens that predict nothing.
    assert changed == {name for name in expected if "layers.3.mlp.vision_moe.experts" not in name}
    assert {layer_index(name) for name in changed} == set(SPARSE[family])
    lines = read_log(folder)
    groups = routed_experts(after)
    assert len(lines[0]["expert_shares"]) == len(groups)
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in lines[0]["expert_shares"])
    assert lines[0]["loss"] >= lines[0]["language_loss"] > 0
    assert lines[0]["balance_loss"] >= 0.9 * len(groups)
    printed = capsys.readouterr().out
    assert ("AriaForConditionalGeneration returns no auxiliary loss" in printed) == (family == "aria")
    assert (lines[0]["loss"] == pytest.approx(lines[0]["language_loss"])) == (family == "aria")


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_compute_in_the_precision_of_the_recipe(family, write_native, tmp_path, monkeypatch):
    """Their products are of bfloat16, and the first step is that of the loop over the experts, whose products autocast casts by itself."""
    seen, steps = set(), []
    multiply = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda x, y, **rest: seen.add((x.dtype, y.dtype)) or multiply(x, y, **rest))
    for way in (native.GROUPED_UNDER_AUTOCAST, "eager"):
        monkeypatch.setattr(native, "GROUPED_UNDER_AUTOCAST", way)
        recipe = load_recipe(write_native(family, precision="bf16", steps=1, output=str(tmp_path / way)))
        (folder,) = train(recipe, [3], False, QUIET)
        (line,) = read_log(folder)
        steps.append((line["loss"], line["grad_norm"]))
        assert seen == {(torch.bfloat16, torch.bfloat16)}
        assert load_checkpoint(folder)[0].dtype == torch.float32
    assert steps[0] == pytest.approx(steps[1], rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_ends_with_the_same_weights(family, write_native, tmp_path, stopping):  # noqa: F811
    (whole,) = train(load_recipe(write_native(family, output=str(tmp_path / "whole"), steps=3)), [3], False, QUIET)
    recipe = load_recipe(write_native(family, steps=3))
    with stopping(2):
        train(recipe, [3], False, QUIET)
    (resumed,) = train(recipe, [3], True, QUIET)
    check_same_weights(whole, resumed)
    assert [{**line, "seconds": 0, "tokens_per_second": 0, "peak_memory": 0} for line in read_log(whole)] == [
        {**line, "seconds": 0, "tokens_per_second": 0, "peak_memory": 0} for line in read_log(resumed)
    ]


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_tuned_all_trains_the_language_model_and_the_projector(family, checkpoints, write_native):
    (folder,) = train(load_recipe(write_native(family, stage3__tuned="all")), [3], False, QUIET)
    before, after = (load_checkpoint(path, dtype=torch.float32)[0] for path in (checkpoints(family), folder))
    states, parts = before.state_dict(), parts_of(after)
    changed = {parts[name] for name, value in after.named_parameters() if not torch.equal(value, states[name])}
    assert {"projector", "attention", "experts", "router", "norms", "embeddings"} <= changed
    assert "tower" not in changed


class Waits(TorchDispatchMode):
    """Count the operations whose results have a size, or are numbers of Python, that depend on values: a GPU is waited for."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        self.number += masks or name in ("nonzero", "bincount", "_local_scalar_dense")
        return function(*arguments, **(settings or {}))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_recording_waits_for_a_gpu_as_often_for_all_routers_as_for_one_layer(family, checkpoints):
    model, _ = load_checkpoint(checkpoints(family))
    groups, mask_T, types = routed_experts(model), torch.arange(8) > 2, torch.arange(8) % 2
    several = sum(group.layer == groups[0].layer for group in groups) > 1
    counts = []
    for some in ([group for group in groups if group.layer == groups[0].layer], groups):
        routers = [model.get_submodule(group.router) for group in some]
        outputs = [router(torch.randn(4 if several else 8, model.config.get_text_config().hidden_size)) for router in routers]
        for router, output in zip(routers, outputs, strict=True):
            router.forward = lambda _, output=output: output
        with Waits() as waits:
            with recorded(model, some, {EXPERT_TYPES: types} if several else {}, mask_T) as routed:
                for router in routers:
                    router(None)
            numbers(routed, some, torch.device("cpu"))
        counts.append(waits.number)
    assert len(routed) == len(groups)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_is_that_of_the_routers_choices(family, checkpoints, write_native, data):  # noqa: F811
    """Counted by hand from what each module of experts is given, record by record: padding does not count."""
    records = [record for record in json.loads((data / "train.json").read_text()) if "image" in record][:2]
    (data / "two.json").write_text(json.dumps(records))
    batch = {"stage3__optimisation__batch_size": 2, "stage3__optimisation__per_device_batch_size": 2, "steps": 1}
    (folder,) = train(load_recipe(write_native(family, stage3__data__file=str(data / "two.json"), **batch)), [3], False, QUIET)
    model, processor = load_checkpoint(checkpoints(family), dtype=torch.float32)
    counts = {group.experts: torch.zeros(4, dtype=torch.long) for group in routed_experts(model)}
    for name, own in counts.items():

        def count(module, arguments, output, own=own):
            ids = next(part for part in arguments if not part.is_floating_point())
            own += torch.bincount(ids.flatten(), minlength=4)

        model.get_submodule(name).register_forward_hook(count)
    encoder, lengths = Encoder(processor), []
    for record in records:
        turns = tuple(turn["value"] for turn in record["conversations"])
        item = encoder(Record("a record", (turns,), tuple(data / name for name in record["image"])))
        lengths.append(len(item.pop("labels")))
        model(**{name: value[None] if value.dim() == 1 else value for name, value in item.items()})
    assert lengths[0] != lengths[1]
    expected = [(own / own.sum()).tolist() for own in counts.values()]
    assert read_log(folder)[0]["expert_shares"] == [pytest.approx(shares, abs=1e-4) for shares in expected]


def test_it_is_not_upcycled(checkpoints):
    with pytest.raises(ValueError, match=r"is sparse already, its layers have experts: .* trained in stage III as it is"):
        upcycle(load_checkpoint(checkpoints("qwen3_vl_moe"))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage3__moe": {"num_experts": 4}}, "but stage3.moe.num_experts is set, which is for experts that are made here: leave it out"),
        (
            {"stage3__moe": {"router_aux_loss_coef": 0.1, "routing": "agnostic", "num_experts_per_tok": 2}},
            "but stage3.moe.num_experts_per_tok, stage3.moe.routing is set",
        ),
        ({"stage3__dense": True}, "but stage3.dense is set, which is for experts that are made here"),
        ({"stage3__expert_start": "noise"}, "but stage3.expert_start is set"),
        ({"stage3__adapter": {"targets": ["attention"]}}, "but stage3.adapter is set"),
    ],
)
def test_settings_of_experts_that_are_made_here_are_refused(write_native, settings, message):
    start = "is a Qwen3VLMoeForConditionalGeneration, which has experts of its own, "
    with pytest.raises(RecipeError, match=start + message):
        train(load_recipe(write_native("qwen3_vl_moe", **settings)), [3], False, QUIET)


def test_a_coefficient_that_the_family_lacks_is_refused(write_native):
    with pytest.raises(RecipeError, match=r"AriaForConditionalGeneration.*, but stage3.moe.router_aux_loss_coef is set"):
        train(load_recipe(write_native("aria", stage3__moe={"router_aux_loss_coef": 0.1})), [3], False, QUIET)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"aria"}))
def test_the_coefficient_of_the_auxiliary_loss_is_that_of_the_recipe(family, write_native, tmp_path):
    """Or the family's own. The language loss does not depend on it, and the finished stage keeps it."""
    losses, folders = [], []
    for coefficient in (None, 0.5, 0.0):
        options = None if coefficient is None else {"router_aux_loss_coef": coefficient}
        recipe = load_recipe(write_native(family, steps=1, stage3__moe=options, output=str(tmp_path / str(coefficient))))
        folders += train(recipe, [3], False, QUIET)
        (line,) = read_log(folders[-1])
        losses.append((line["loss"], line["language_loss"]))
    own, half, none = (loss - language for loss, language in losses)
    assert none == pytest.approx(0, abs=1e-5)
    assert 0 < own < half
    assert {round(language, 5) for _, language in losses} == {round(losses[0][1], 5)}
    assert [load_checkpoint(folder)[0].config.text_config.router_aux_loss_coef for folder in folders[1:]] == [0.5, 0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_accumulation_weighs_both_losses_by_labels(family, write_native, tmp_path):
    """The language loss is the same for all sizes of a batch. The auxiliary loss differs, but is a mean over the batches, not a sum."""
    losses = []
    for per_device in (6, 2):
        settings = {"stage3__optimisation__batch_size": 6, "stage3__optimisation__per_device_batch_size": per_device, "steps": 1}
        (folder,) = train(load_recipe(write_native(family, output=str(tmp_path / str(per_device)), **settings)), [3], False, QUIET)
        (line,) = read_log(folder)
        losses.append((line["language_loss"], line["loss"] - line["language_loss"]))
    (language, auxiliary), (other, others) = losses
    assert other == pytest.approx(language, rel=1e-5)
    assert others == pytest.approx(auxiliary, rel=0.3, abs=1e-6)


def test_stages_1_and_2_are_refused(write_native, data):  # noqa: F811
    one = {"data": {"file": str(data / "train.json"), "images": str(data)}}
    one["optimisation"] = {"learning_rate": 1e-2, "batch_size": 3, "per_device_batch_size": 3, "max_steps": 1}
    with pytest.raises(RecipeError, match="which has experts of its own: only stage III trains it, so leave out stage1"):
        train(load_recipe(write_native("qwen3_vl_moe", stage1=one)), [1, 3], False, QUIET)


def test_routers_that_do_not_say_what_they_choose_are_refused(checkpoints, monkeypatch):
    model = load_on_meta(checkpoints("aria"))
    check_routers(model)
    router = type(next(iter(find_routers(model).values())))
    whole = router.forward
    monkeypatch.setattr(router, "forward", lambda self, x: whole(self, x)[:2])
    with pytest.raises(RoutingError, match=r"layers.0.mlp.router returns shapes .* but must return logits \[T, 4\], weights"):
        check_routers(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_counts_what_a_token_uses(family, checkpoints, write_native):
    """A text token of ERNIE goes through its text experts, never through those for images."""
    model, _ = load_checkpoint(checkpoints(family))
    budget, costs = survey(load_recipe(write_native(family)))
    assert sum(budget.total.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert (budget.moe_layers, budget.experts, list(costs)) == (list(SPARSE[family]), (4, 2), ["stage3"])
    first = {group.layer: group for group in reversed(routed_experts(model))}.values()
    used = sum(parameter.numel() for group in first for parameter in model.get_submodule(group.experts).parameters()) // 2
    assert active_parameters(model) == sum(budget.total.values()) - budget.total["experts"] + used


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ernie4_5_vl_moe", "qwen3_vl_moe"])
def test_two_processes_train_batches_without_images(family, write_native, data, tmp_path):  # noqa: F811
    """A process whose batch has no image uses all experts all the same, or the other would wait for their gradients."""
    records = [record for record in json.loads((data / "train.json").read_text()) if "image" not in record]
    (tmp_path / "text.json").write_text(json.dumps(records))
    settings = {"stage3__optimisation__batch_size": 4, "stage3__optimisation__per_device_batch_size": 2}
    file = write_native(family, stage3__data__file=str(tmp_path / "text.json"), **settings)
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2", "-m", "tests.families.cli", "train", file]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_log(tmp_path / "run" / "stage3")] == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_with_the_same_weights_has_nothing_to_teach_at_first(family, checkpoints, write_native):
    recipe = load_recipe(write_native(family, stage3__distillation={"teacher": str(checkpoints(family)), "weight": 0.5}))
    (plain,) = train(load_recipe(write_native(family), ["output=" + recipe.output + "-plain"]), [3], False, QUIET)
    (folder,) = train(recipe, [3], False, QUIET)
    first, before = read_log(folder)[0], read_log(plain)[0]
    assert abs(first["distillation_loss"]) < 1e-5
    assert first["language_loss"] == pytest.approx(before["language_loss"], rel=1e-5)
    assert first["loss"] == pytest.approx(before["loss"] - 0.5 * before["language_loss"], rel=1e-5)
