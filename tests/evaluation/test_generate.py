"""Answers do not depend on the other questions of a batch."""

from dataclasses import replace
from io import BytesIO

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.common.errors import DataError
from moe_llava.common.images import InlineImage, open_image
from moe_llava.evaluation.ask import generate
from moe_llava.evaluation.ask.generate import _losses_of, answer, in_background, prompt_inputs
from moe_llava.evaluation.ask.options import Restriction
from moe_llava.evaluation.ask.prompts import prompt_text
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress import attack as attack_module
from moe_llava.evaluation.stress.attack import attacked_pixels
from moe_llava.evaluation.stress.perturb import Perturbation, perturb_image, perturb_question
from moe_llava.evaluation.stress.words import attack_words
from moe_llava.model.upcycling import upcycle
from tests.conftest import FAMILIES, tiny_config
from tests.training.conftest import tiny_base  # noqa: F401


@pytest.fixture(scope="module")
def asked(tiny_base):  # noqa: F811
    """Return (model, processor, questions about one image, none, and two)."""
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.float32)
    questions = digits_world.questions(tiny_base / "data")[:14:2]
    images = questions[0].images * 2
    text = Question("text", "which digit is leftmost ?")
    return model, processor, [*questions, text, Question("two", "<image> is this <image> a red 7 ?", images)]


def answers(model, processor, questions, batch_size, max_new_tokens=12, perturbation=None):
    given = dict(pair for batch in answer(model, processor, questions, batch_size, max_new_tokens, perturbation) for pair in batch)
    return [given[index] for index in range(len(questions))]


def plainly(model, processor, question, max_new_tokens=12, attack=None):
    """Return the answer by plain transformers, with nothing shared."""
    inputs = prompt_inputs(processor, [question])
    if attack is not None and question.images:
        inputs["pixel_values"] = attacked_pixels(model, processor.image_processor, inputs, attack, max_new_tokens)
    suppressed = [model.config.image_token_id]
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=suppressed)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_one_by_one(asked, family, sparse):
    _, processor, questions = asked
    config = tiny_config(family, layers=4 if "gemma" in family else 2)  # with two, those of Gemma repeat one word
    config.image_token_id = processor.tokenizer.image_token_id
    config.vision_config.image_size = 48
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model = upcycle(model, num_experts=3).eval() if sparse else model
    together = answers(model, processor, questions, 16, max_new_tokens=6)
    assert together == answers(model, processor, questions, 1, max_new_tokens=6)
    assert together == [plainly(model, processor, question, max_new_tokens=6) for question in questions]
    assert len(set(together)) > 1


def changed(question, perturbation):
    """Return the question with pictures that are perturbed beforehand."""
    images = []
    for image in question.images:
        file = BytesIO()
        perturb_image(open_image(image, "here"), perturbation).save(file, "PNG")
        images.append(InlineImage("a.png", file.getvalue()))
    return replace(perturb_question(question, perturbation), images=tuple(images))


@pytest.mark.parametrize("name", ["noise", "typos"])
def test_perturbed_as_if_changed_beforehand(asked, name):
    model, processor, questions = asked
    perturbation = Perturbation(name, 5)
    found = answers(model, processor, questions, 16, perturbation=perturbation)
    assert found == [plainly(model, processor, changed(question, perturbation)) for question in questions]
    assert found != answers(model, processor, questions, 16)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_every_question_is_attacked_for_itself(asked, name):
    model, processor, questions = asked
    attack = Perturbation(name, 5)
    found = answers(model, processor, questions, 16, perturbation=attack)
    assert found == [plainly(model, processor, question, attack=attack) for question in questions]
    clean = answers(model, processor, questions, 16)
    assert found != clean
    without = [place for place, question in enumerate(questions) if not question.images]
    assert without
    assert [found[place] for place in without] == [clean[place] for place in without]


def test_words_that_are_attacked(asked, monkeypatch):
    model, processor, questions = asked
    attack, typos = Perturbation("words", 5), Perturbation("typos", 5)
    found = answers(model, processor, questions, 16, perturbation=attack)
    clean = answers(model, processor, questions, 16)
    assert found != clean
    stronger = []
    for number, question in enumerate(questions):
        losses = _losses_of(model, processor, question, Restriction([]), 16, 12)
        attacked = attack_words(question, attack, losses)
        assert found[number] == plainly(model, processor, attacked)
        wordings = [question, attacked, perturb_question(question, typos)]
        before, after, random = losses(wordings)
        assert after >= before
        stronger.append(after - random)
        assert losses([question]) == pytest.approx([before], abs=1e-5)  # whatever is in the batch
        with monkeypatch.context() as patch:
            patch.setattr(generate, "shares_heads", lambda processor: False)
            whole = _losses_of(model, processor, question, Restriction([]), 2, 12)
        assert whole(wordings) == pytest.approx([before, after, random], abs=1e-5)
    assert sum(value > 0 for value in stronger) > len(stronger) / 2  # than typos at random


OPTIONS = ("red 7", "red", "blue 3 red", "7 blue", "blue 3")  # some begin another, or as another does


def chosen(model, processor, question):
    """Return the option that plain forward passes lead to, token by token."""
    tokenizer = processor.tokenizer
    ids = [[*tokenizer(option, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for option in question.options]
    inputs, written = prompt_inputs(processor, [question]), []
    while not written or written[-1] != tokenizer.eos_token_id:
        following = sorted({each[len(written)] for each in ids if each[: len(written)] == written})
        continued = {name: torch.cat([inputs[name], torch.tensor([row])], 1) for name, row in
                     (("input_ids", written), ("attention_mask", [1] * len(written)))} if written else {}  # fmt: skip
        logits = model(**{**inputs, **continued}).logits[0, -1]
        written.append(max(following, key=lambda token: logits[token]))
    return tokenizer.decode(written[:-1])


def test_only_options_are_written(asked, monkeypatch):
    model, processor, questions = asked
    given = [replace(question, options=OPTIONS[: 2 + place % 4]) for place, question in enumerate(questions)]
    found = answers(model, processor, given, 16)
    assert found == [chosen(model, processor, question) for question in given]
    assert len(set(found)) > 1
    assert found == answers(model, processor, given, 1)
    assert found == answers(model, processor, given, 16, max_new_tokens=1)  # which would cut them
    monkeypatch.setattr(generate, "shares_heads", lambda processor: False)
    assert found == answers(model, processor, given, 16)
    with pytest.raises(BenchmarkError, match=f"question {questions[1].id} has no options, but others have"):
        answers(model, processor, [given[0], questions[1]], 16)


@pytest.mark.parametrize("name", ["pgd", "words"])
def test_attacks_are_against_the_option_that_was_chosen(asked, monkeypatch, name):
    model, processor, questions = asked
    given = [replace(question, options=OPTIONS) for question in questions[:4]]
    clean, targets = answers(model, processor, given, 16), []
    module = generate if name == "words" else attack_module
    real = module.own_answers

    def own_answers(*arguments):
        inputs, labels = real(*arguments)
        targets.extend(processor.tokenizer.decode([token for token in row if token != -100], skip_special_tokens=True) for row in labels)
        return inputs, labels

    monkeypatch.setattr(module, "own_answers", own_answers)
    assert set(answers(model, processor, given, 16, perturbation=Perturbation(name, 5))) <= set(OPTIONS)
    assert sorted(targets) == sorted(clean)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'user' if add_generation_prompt else 'red' }}", "with the answer 'red 7' its prompt is other tokens"),
        ("{% for message in messages %}{{ message['role'] }} {% endfor %}", "options that are the same tokens to this model: red 7, red,"),
    ],
)
def test_a_template_that_loses_answers_takes_no_options(asked, monkeypatch, template, message):
    model, processor, questions = asked
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(BenchmarkError, match=f"question text has .*{message}"):
        answers(model, processor, [replace(questions[-2], options=OPTIONS)], 1)


def test_nothing_after_the_end(asked):
    """Answers contain neither the end token nor the padding after it, whatever token that is."""
    model, processor, questions = asked
    before = [text.split() for text in answers(model, processor, questions, batch_size=16)]
    # A word in the middle of the longest answer ends it, and pads what is shorter.
    longest = max(before, key=len)
    middle = longest[len(longest) // 2]
    ends = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    token = processor.tokenizer.convert_tokens_to_ids(middle)
    try:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = [ends[0], token], 7
        found = [text.split() for text in answers(model, processor, questions, batch_size=16)]
    finally:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends
    assert found == [words[: words.index(middle)] if middle in words else words for words in before]
    assert found != before
    assert len({len(words) for words in found}) > 1


def test_what_prompts_share_is_read_once(asked, monkeypatch):
    model, processor, questions = asked
    read, real = [], generate._prefill_heads
    monkeypatch.setattr(generate, "_prefill_heads", lambda model, heads: read.append(len(heads["input_ids"])) or real(model, heads))
    answers(model, processor, questions, batch_size=4, max_new_tokens=2)
    pictures = {question.images for question in questions if len(question.images) == 1}
    assert read == [1, len(pictures)]  # two images in a prompt of its own; then all the others
    assert len(pictures) < len(questions) - 2


def test_images_come_first_or_where_the_prompt_says(asked):
    _, processor, _ = asked
    picture = InlineImage("a.png", b"")
    assert prompt_text(processor, Question("1", "where ?", (picture,) * 2)).count("<image> <image> where ?") == 1
    assert "is this<image> a 7 ?" in prompt_text(processor, Question("1", "is this <image> a 7 ?", (picture,)))
    for images in ((), (picture,) * 2):
        with pytest.raises(BenchmarkError, match=f"question 1 has 1 <image> in its prompt and {len(images)} images"):
            prompt_text(processor, Question("1", "is this <image> a 7 ?", images))


@pytest.mark.parametrize("template", ["{{ raise_exception('no users') }}", "{{ 'user: ' + messages[0]['content'] }}"])
def test_a_template_that_refuses_a_question_is_named(asked, monkeypatch, template):
    _, processor, _ = asked
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(BenchmarkError, match=r"the model's chat template refuses question 1: (no users|can only concatenate str)"):
        prompt_text(processor, Question("1", "where ?", ()))


def test_prompts_are_padded_on_the_left(asked):
    _, processor, questions = asked
    inputs = prompt_inputs(processor, questions)
    assert inputs["attention_mask"][:, -1].all()
    assert not inputs["attention_mask"][:, 0].all()
    assert (inputs["input_ids"][:, -1] == processor.tokenizer.convert_tokens_to_ids("assistant:")).all()
    assert "pixel_values" not in prompt_inputs(processor, [question for question in questions if not question.images])


def test_an_image_in_the_question_file_and_one_that_is_broken(asked):
    model, processor, questions = asked
    inline = Question("1", questions[0].prompt, (InlineImage("a.png", questions[0].images[0].read_bytes()),))
    assert answers(model, processor, [inline], 1) == answers(model, processor, questions[:1], 1)
    broken = Question("7", "where ?", (InlineImage("b.png", b"no image"),))
    with pytest.raises(DataError, match=r"question 7 names the image b.png, which cannot be decoded"):
        answers(model, processor, [broken], 1)


def test_in_background_keeps_order_and_tells_of_errors():
    assert list(in_background(lambda number: number * 2, range(20))) == list(range(0, 40, 2))
    with pytest.raises(ZeroDivisionError):
        list(in_background(lambda number: 1 // number, [1, 0]))
