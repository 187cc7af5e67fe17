"""lmms-eval's own command with tasks of local files, and unsupported settings of tasks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; the Makefile says how")

from lmms_eval.api.instance import Instance
from lmms_eval.models import MODEL_REGISTRY_V2

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.common.images import open_image
from moe_llava.evaluation import lmms_model
from moe_llava.evaluation.ask import generate
from moe_llava.evaluation.ask.generate import answer
from moe_llava.evaluation.lmms_model import MoeLlava, TaskImage
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.model.upcycling import upcycle
from tests.conftest import REPOSITORY
from tests.training.conftest import tiny_base  # noqa: F401

BIN = Path(sys.executable).parent
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output}
doc_to_visual: !function functions.pictures
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {tokens}, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
# Pictures in memory, as most tasks have them, and as files.
FUNCTIONS = """
from PIL import Image
def pictures(doc):
    return [Image.open(doc["image"]) if doc["opened"] else doc["image"]]
"""


@pytest.fixture(scope="module")
def questions(tiny_base):  # noqa: F811
    return digits_world.questions(tiny_base / "data")[:14]


@pytest.fixture(scope="module")
def sparse(tiny_base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("lmms") / "sparse"
    model, processor = load_checkpoint(tiny_base / "base")
    upcycle(model, num_experts=3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(sparse):
    return MoeLlava(str(sparse), dtype="float32", device="cpu", batch_size="4")


@pytest.fixture
def tasks(questions, tmp_path):
    """A folder with two tasks that have the same questions and different lengths."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [
        {"prompt": question.prompt, "image": str(question.images[0]), "opened": index % 3 > 0, "answer": question.extra["answer"]}
        for index, question in enumerate(questions)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, tokens in (("short", 3), ("long", 12)):
        settings = {"name": name, "file": folder / "docs.jsonl", "output": "generate_until", "tokens": tokens}
        (folder / f"{name}.yaml").write_text(TASK.format(**settings))
    return folder


def text(words):
    return {"type": "text", "text": words}


def video(file):
    return {"type": "video", "url": file}


def part(image):
    return {"type": "image", "url": image}


def picture(question):
    return part(Image.open(question.images[0]))


def plainly(checkpoint, questions, max_new_tokens):
    model, processor = load_checkpoint(checkpoint)
    given = dict(pair for batch in answer(model, processor, questions, 4, max_new_tokens) for pair in batch)
    return [given[index] for index in range(len(questions))]


def run(tasks, out, *command, arguments):
    """Return (lmms-eval's output, task -> its answers in order)."""
    command = [*command, "--model", "moe_llava", "--model_args", arguments, "--device", "cpu", "--batch_size", "4"]
    command += ["--include_path", tasks, "--tasks", "short,long", "--output_path", out, "--log_samples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    found = {}
    for file in out.rglob("*_samples_*.jsonl"):
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[file.stem.split("_samples_")[1]] = [sample["filtered_resps"] for sample in samples]
    return done.stdout + done.stderr, found


def requests(model, chats, settings):
    """Return a request for each chat, as lmms-eval passes them."""
    model.task_dict = {"some": {"test": chats}}
    return [
        Instance("generate_until", ("", list, settings, number, "some", "test"), 0, {"task": "some", "doc_id": number, "repeats": 1})
        for number in range(len(chats))
    ]


def ask(model, contents, **settings):
    chats = [[{"role": "user", "content": content}] for content in contents]
    return model.generate_until(requests(model, chats, {"max_new_tokens": 12} | settings))


def test_lmms_eval_finds_the_model():
    assert MODEL_REGISTRY_V2.get_model_class("moe_llava") is MoeLlava


@pytest.mark.slow
def test_the_command_answers_as_we_do(tasks, sparse, questions, tmp_path):
    printed, found = run(tasks, tmp_path / "out", BIN / "lmms-eval", arguments=f"pretrained={sparse}")
    assert found == {"short": plainly(sparse, questions, 3), "long": plainly(sparse, questions, 12)}, printed
    assert len(set(found["long"])) > 1
    assert "exact_match" in printed


@pytest.mark.slow
def test_two_processes(tasks, tiny_base, questions, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval", "--limit", "5"]
    printed, found = run(tasks, tmp_path / "out", *command, arguments=f"pretrained={tiny_base / 'base'},dtype=float32")
    expected = {name: plainly(tiny_base / "base", questions[:5], tokens) for name, tokens in (("short", 3), ("long", 12))}
    assert found == expected, printed
    assert printed.count("evaluating: ") == 1


def test_each_picture_is_read_once(asked, questions, monkeypatch):
    """Tasks hold a picture in memory once per question, so it is identified by its content."""
    read, real = [], generate._prefill_heads
    monkeypatch.setattr(generate, "_prefill_heads", lambda model, heads: read.append(len(heads["input_ids"])) or real(model, heads))
    ask(asked, [[picture(question), text(question.prompt)] for question in questions])
    assert sum(read) == len({question.images for question in questions}) < len(questions)


def test_where_images_stand(asked, questions, tmp_path):
    image = questions[0].images[0]
    one, other = Image.open(image), Image.open(questions[-1].images[0])
    contents = [
        [part(one), text("is this"), part(other), text("a 7 ?")],
        [part(one), part(other), text("is this <image> <image> a 7 ?")],
        [part(str(image)), text("is this a 7 ?")],
        [text("is this a 7 ?")],
    ]
    pictures = (image, questions[-1].images[0])
    asked_so = [("<image>\nis this\n<image>\na 7 ?", pictures), ("is this <image> <image> a 7 ?", pictures)]
    asked_so += [("is this a 7 ?", (image,)), ("is this a 7 ?", ())]
    expected = [
        dict(pair for batch in answer(asked.model, asked.processor, [Question("1", *question)], 1, 6) for pair in batch)[0]
        for question in asked_so
    ]
    assert ask(asked, contents, max_new_tokens=6) == expected
    assert len(set(expected)) > 2


def test_pictures_of_a_task(tmp_path):
    picture = Image.effect_noise((7, 5), 90).convert("RGBA")
    held = TaskImage("one", lmms_model._digest(picture), lambda: picture)
    assert open_image(held, "question 1").tobytes() == picture.convert("RGB").tobytes()
    assert held == TaskImage("two", lmms_model._digest(picture.copy()), lambda: None)
    assert held != TaskImage("one", lmms_model._digest(picture.transpose(Image.Transpose.ROTATE_180)), lambda: picture)
    flat = Image.new("RGB", (4, 2))
    assert lmms_model._digest(flat) != lmms_model._digest(flat.resize((2, 4)))


def test_pictures_of_a_task_are_read_as_files_are(asked):
    sideways = Image.effect_noise((7, 5), 90).convert("LA")
    sideways.getexif()[0x0112] = 6
    assert open_image(TaskImage("one", "", lambda: sideways), "question 1").size == (5, 7)
    with pytest.raises(BenchmarkError, match="question 0 of task some has an image that cannot be read: its pixels are floating-point"):
        ask(asked, [[part(Image.new("F", (4, 4))), text("is this a 7 ?")]])


@pytest.mark.parametrize("until", [["top", "\n\n", ""], "top"], ids=["list", "text"])
def test_answers_end_at_the_strings_of_a_task(asked, questions, until):
    contents = [[picture(question), text(question.prompt)] for question in questions]
    whole = ask(asked, contents)
    assert any("top" in found for found in whole)
    assert ask(asked, contents, until=until) == [found.split("top")[0] for found in whole]
    assert ask(asked, contents, until=["\n\n"]) == ask(asked, contents, until=None) == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "task some wants do_sample=True, but answers are greedy; `--gen_kwargs do_sample=False` overrules the task"),
        ({"temperature": 0.2}, "task some wants temperature=0.2"),
        ({"num_beams": 5}, "task some wants num_beams=5"),
        ({"repetition_penalty": 1.2}, "task some wants repetition_penalty=1.2"),
        ({"max_new_tokens": 0}, "task some wants max_new_tokens=0, which must be a number from 1"),
        ({"visual_cot": True}, "task some wants visual_cot=True, which this model does not know"),
    ],
    ids=str,
)
def test_wishes_that_are_refused(asked, monkeypatch, settings, message):
    monkeypatch.setattr(lmms_model, "answer", None)  # nothing is asked
    greedy = {"do_sample": False, "temperature": 0.0, "num_beams": 1, "top_p": 1.0, "image_aspect_ratio": "pad", "until": ["</s>"]}
    with pytest.raises(BenchmarkError, match="^" + re.escape(message)):
        ask(asked, [[text("what ?")]] * 2, **greedy | settings)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system"}, {"role": "user"}], "question 0 of task some is a chat of system, user; this model takes"),
        (
            [{"role": "user", "content": [video("gone.mp4")]}],
            "question 0 of task some of lmms-eval names the video gone.mp4, which does not",
        ),
        (
            [{"role": "user", "content": [video(b"")]}],
            "comes with 0 images and 1 videos, such as b''; this model takes images, or the file",
        ),
        ([{"role": "user", "content": [video("a.mp4"), part("a.png")]}], "comes with 1 images and 1 videos, such as a.mp4"),
        ([{"role": "user", "content": [video("a.mp4"), video("b.mp4")]}], "comes with 0 images and 2 videos"),
        ([{"role": "user", "content": [{"type": "audio"}, video("a.mp4")]}], "comes with audio; this model takes text and images, or"),
        ([{"role": "user", "content": [part({})]}], "question 0 of task some must have pictures or files as its images, but has {}"),
        ([{"role": "user", "content": [part("a.png")]}], "lmms-eval names the image a.png, which does not exist"),
        ([{"role": "user", "content": [text("<image> ?")]}], "question 0 of task some of lmms-eval has 1 <image> and 0 images"),
    ],
    ids=["system", "missing video", "no file", "both", "two videos", "audio", "image", "file", "placeholder"],
)
def test_chats_that_are_refused(asked, monkeypatch, messages, message):
    monkeypatch.setattr(lmms_model, "answer", None)  # nothing is asked
    with pytest.raises(BenchmarkError, match=message):
        asked.generate_until(requests(asked, [messages], {}))


def test_other_requests_and_arguments_are_refused(asked, sparse):
    given = requests(asked, [[]], {})
    with pytest.raises(BenchmarkError, match="some: the likelihood of given answers is not supported"):
        asked.loglikelihood(given)
    with pytest.raises(BenchmarkError, match="some: answers in several rounds is not supported"):
        asked.generate_until_multi_round(given)
    for batch_size in ("auto", 0, "-1"):
        with pytest.raises(BenchmarkError, match=f"batch_size must be a number from 1, but is {batch_size!r}"):
            MoeLlava(str(sparse), batch_size=batch_size)
    with pytest.raises(ValueError, match="dtype is 'half', but must be one of auto, float32, bfloat16, float16"):
        MoeLlava(str(sparse), dtype="half")
    with pytest.raises(TypeError, match="unexpected keyword argument 'precision'"):
        MoeLlava.create_from_arg_string(f"pretrained={sparse},precision=16", {"batch_size": 1})
    with pytest.raises(ValueError, match="is not a folder"):
        MoeLlava(str(sparse / "gone"))
    assert asked.generate_until([]) == []  # of several processes, one may have nothing to ask
