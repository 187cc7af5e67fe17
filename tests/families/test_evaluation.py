"""Questions are answered by any family as `generate` answers them, clean and under attack."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from moe_llava import upcycle
from moe_llava.data.encoder import TOKEN_TYPES, Encoder
from moe_llava.data.records import Record
from moe_llava.data.rendering import make_portable
from moe_llava.evaluation.ask.calibration import yes_probabilities
from moe_llava.evaluation.ask.generate import answer, prompt_inputs, shares_heads
from moe_llava.evaluation.ask.prompts import prompt_text
from moe_llava.evaluation.ask.tasks import check_questions
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress.perturb import Perturbation
from moe_llava.model.greedy import end_tokens, write_greedily
from tests.common.test_videos import write_video
from tests.families.processors import ROWS, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for number, size in enumerate(((40, 30), (20, 60), (33, 33))):
        Image.new("RGB", size, (60 * number, 200, 90)).save(folder / f"{number}.png")
    paths = [folder / f"{number}.png" for number in range(3)]
    return [
        Question("one", "What is in the picture?", (paths[0],)),
        Question("same", "Where is it, in the picture?", (paths[0],)),
        Question("two", "Compare.", (paths[1], paths[2])),
        Question("text", "Why?"),
        Question("other", "Is it red?", (paths[1],)),
    ]


def made(family):
    processor = tiny_processor(family)
    portable = make_portable(processor.chat_template, processor.tokenizer, processor.image_token)
    processor.chat_template = processor.tokenizer.chat_template = portable
    return upcycle(tiny_model(family, processor), num_experts=4, num_experts_per_tok=2), processor


@pytest.mark.parametrize("family", sorted(ROWS))
def test_answers_are_those_of_generate(family, questions):
    """In batches of prompts with one image, two and none; and the probability of yes is that of the first token."""
    model, processor = made(family)
    found = dict(pair for batch in answer(model, processor, questions, 2, 6) for pair in batch)
    for index, question in enumerate(questions):
        inputs = prompt_inputs(processor, [question])
        written = write_greedily(model, dict(inputs), 6)[0, inputs["input_ids"].shape[1] :]
        assert found[index] == processor.tokenizer.decode(written, skip_special_tokens=True).strip(), question.id
    together = yes_probabilities(model, processor, questions, 5)
    alone = [yes_probabilities(model, processor, [question], 1)[0] for question in questions]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "smolvlm"])
def test_answers_about_videos_are_those_of_generate(family, questions, tmp_path):
    """In batches with videos of several lengths, images and text. Perturbations are refused."""
    pytest.importorskip("av")
    model, processor = made(family)
    files = [write_video(tmp_path / f"{number}.mp4", number=number, fps=2) for number in (6, 11)]
    asked = [
        Question("first", "What happens?", video=files[0]),
        Question("second", "Here: <video>\nWhat happens now?", video=files[1]),
        questions[0],
        questions[3],
    ]
    check_questions("a test", asked)
    found = dict(pair for batch in answer(model, processor, asked, 3, 6) for pair in batch)
    for index, question in enumerate(asked):
        inputs = prompt_inputs(processor, [question])
        written = write_greedily(model, dict(inputs), 6)[0, inputs["input_ids"].shape[1] :]
        assert found[index] == processor.tokenizer.decode(written, skip_special_tokens=True).strip(), question.id
    record = Record("a record", (("<video>\nWhat happens?", "x"),), video=files[0])
    prompt, ids = prompt_inputs(processor, asked[:1])["input_ids"][0], Encoder(processor)(record)["input_ids"]
    assert torch.equal(prompt[:-8], ids[: len(prompt) - 8])  # the end of a prompt may differ from the beginning of an answer
    with pytest.raises(BenchmarkError, match="question first has a video, but only images and texts are perturbed"):
        list(answer(model, processor, asked, 3, 6, Perturbation("blur", 1, 0)))


def test_questions_about_videos_that_are_refused(tmp_path):
    model, processor = made("llava")
    (tmp_path / "clip.mp4").write_bytes(b"not read")
    with pytest.raises(BenchmarkError, match="question one has a video, but the model's LlavaProcessor takes no videos"):
        list(answer(model, processor, [Question("one", "What?", video=tmp_path / "clip.mp4")], 1, 1))
    with pytest.raises(BenchmarkError, match="question one of a test has 2 <video> and 1 videos"):
        check_questions("a test", [Question("one", "<video> <video>", video=tmp_path / "clip.mp4")])
    with pytest.raises(BenchmarkError, match=r"question one of a test names the video .*gone.mp4, which does not exist"):
        check_questions("a test", [Question("one", "What?", video=tmp_path / "gone.mp4")])


@pytest.mark.parametrize("family", sorted(ROWS))
def test_answers_are_options(family, questions):
    """With each family's chat template: the option that plain forward passes lead to, token by token, alone and in batches."""
    model, processor = made(family)
    tokenizer, options = processor.tokenizer, ("red square", "red", "blue circle", "a red and blue image")
    given = [replace(question, options=options) for question in questions]
    found = dict(pair for batch in answer(model, processor, given, 2, 16) for pair in batch)
    for index, question in enumerate(given):
        inputs = prompt_inputs(processor, [question])
        prompt = prompt_text(processor, question)
        answered = {option: prompt_text(processor, question, option).removeprefix(prompt) for option in options}
        left = {option: tokenizer(text, add_special_tokens=False)["input_ids"] for option, text in answered.items()}
        if family == "glm4v":  # whose template begins the next turn, but does not end an answer
            left = {option: [*ids, *end_tokens(model)] for option, ids in left.items()}
        written: list[int] = []
        while len(left) > 1:
            row = torch.tensor([[*inputs["input_ids"][0].tolist(), *written]])
            more = {name: torch.nn.functional.pad(inputs[name], (0, len(written))) for name in TOKEN_TYPES if name in inputs}
            logits = model(**{**inputs, **more, "input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0, -1]
            written.append(max((ids[len(written)] for ids in left.values()), key=lambda token: logits[token]))
            left = {option: ids for option, ids in left.items() if ids[: len(written)] == written}
        assert [found[index]] == list(left), question.id


def test_which_families_share_the_heads_of_prompts():
    assert {family for family in ROWS if shares_heads(made(family)[1])} == {
        "llava", "llava_next", "llava_onevision", "vipllava",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gemma3", "internvl", "smolvlm"])
def test_an_attack_changes_answers_not_texts(family, questions):
    model, processor = made(family)
    attack = Perturbation("fgsm", 5, 0)
    found = dict(pair for batch in answer(model, processor, questions, 2, 4, attack) for pair in batch)
    clean = dict(pair for batch in answer(model, processor, questions, 2, 4) for pair in batch)
    assert found.keys() == clean.keys()
    assert found[3] == clean[3]  # without an image


def test_patches_are_not_attacked_but_words_are(questions):
    model, processor = made("qwen3_vl")
    batches = list(answer(model, processor, questions, 2, 4, Perturbation("words", 5, 0)))
    assert sorted(index for batch in batches for index, _ in batch) == list(range(len(questions)))
    with pytest.raises(ValueError, match="takes images as flattened patches"):
        list(answer(model, processor, questions, 2, 4, Perturbation("fgsm", 5, 0)))
