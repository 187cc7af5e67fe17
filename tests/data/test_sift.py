"""Bad records and unusable templates before the first step: named all at once, or left out, counted and logged."""

import io
import json
import math
import re

import datasets
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoProcessor

from moe_llava.checkpoints.load import load_processor
from moe_llava.common.errors import DataError
from moe_llava.common.files import read_lines
from moe_llava.data.check import check_data
from moe_llava.data.store import load_records, read_records
from moe_llava.training.recipe import load_recipe
from moe_llava.training.run import train
from tests.conftest import refused, run_here
from tests.data.chat_templates import GEMMA_2, MISTRAL, QWEN_2_5
from tests.training.conftest import stopping, tiny_base, write_recipe  # noqa: F401


def conversation(*values, **keys):
    return {"conversations": [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)], **keys}


SOUND = conversation("<image>\nwhich digit is red ?", "7", image="a.png")
# What is wrong -> the record, or the line.
BAD = {
    "is neither a JSON list nor JSON lines: line 2": '{"conversations": [',
    "must have 'conversations' or 'messages', but is 5": "5",
    "names the image .*gone.png, which does not exist": conversation("<image>\nwhere ?", "here", image="gone.png"),
    "found 2 image tokens in line 5 of .* but 1 images": conversation("<image><image>\nwhere ?", "here", image="a.png"),
    "line 6 of .* has a video, but the model's .*LlavaProcessor takes no videos": conversation("<video>\nwhere ?", "here", video=["a.png"]),
    "turn 0 of line 7 of .* must be a text from 'human'": {"conversations": [{"from": "gpt", "value": "x"}] * 2},
    "has images of 72 tokens, but stage1.max_length is 60": conversation("<image><image>\nwhere ?", "here", image=["a.png", "a.png"]),
    "line 9 of .*: the chat template refuses it: System role not supported": SOUND | {"system": "be brief ."},
    "half of a character": conversation("where ? \ud800", "here"),
    "line 11 of .* has no image, but stage I": conversation("where ?", "here"),
}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder, records, name="data.jsonl"):
    (folder / name).write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return {"file": str(folder / name), "images": str(folder)}


def told(recipe, stages, **settings):
    console = Console(file=io.StringIO(), width=400)
    return train(load_recipe(recipe), stages, console=console, **{"resume": False} | settings), console.file.getvalue()


@pytest.fixture
def strict_base(tiny_base, tmp_path):  # noqa: F811
    """Return the tiny model with a template that refuses system prompts."""
    processor = AutoProcessor.from_pretrained(tiny_base / "base")
    folder = tmp_path / "base"
    folder.mkdir()
    for file in (tiny_base / "base").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + processor.chat_template)
    return folder


def test_every_kind_of_bad_record_is_left_out_counted_and_logged(folder, strict_base, write_recipe):  # noqa: F811
    data = write(folder, [SOUND, *BAD.values(), *[SOUND] * 7])
    file = write_recipe(model=str(strict_base), stage1__data=data, stage1__max_length=60)
    with pytest.raises(DataError) as caught:
        told(file, [1])
    for message in BAD:
        assert re.search(message, str(caught.value)), message
    file = write_recipe(model=str(strict_base), stage1__data=data, stage1__max_length=60, on_bad_record="skip")
    (stage,), printed = told(file, [1])
    lines = read_lines(stage / "skipped.jsonl")
    assert [line["step"] for line in lines] == [0] * len(BAD)
    for message in BAD:
        assert sum(bool(re.search(message, line["problem"])) for line in lines) == 1, message
    assert "8 records" in printed
    assert f"bad records left out: {len(BAD)}, named in skipped.jsonl" in printed
    assert lines[0]["problem"] in printed
    assert [line["skipped"] for line in read_lines(stage / "log.jsonl") if "loss" in line] == [0] * 3  # none of those that a step sees
    assert json.loads((stage / "records.json").read_text())["records"] == 8


def test_left_out_records_are_the_same_after_resuming(folder, tiny_base, write_recipe, stopping):  # noqa: F811
    data = write(folder, [SOUND] * 8 + ["{", conversation("x", "y", audio=["a.wav"])])
    file = write_recipe(stage1__data=data, on_bad_record="skip", save_steps=1)
    with stopping(2):
        told(file, [1])
    (stage,), _ = told(file, [1], resume=True)
    assert [line["problem"].split(":")[0].split(" of ")[0] for line in read_lines(stage / "skipped.jsonl")][1:] == ["line 10"]
    assert len(read_lines(stage / "skipped.jsonl")) == 2


def test_nothing_is_left(folder, write_recipe):  # noqa: F811
    data = write(folder, ["{}", "[]"])
    with pytest.raises(DataError, match=r"leaves no record of it, without 2 bad ones, such as line 1 of .* must have 'conversations'"):
        told(write_recipe(stage1__data=data, on_bad_record="skip"), [1])


def test_records_that_the_original_code_accepts_are_trained_on(folder, write_recipe):  # noqa: F811
    """An empty answer, which is not learnt; a placeholder without an image, which is text; an answer before the first question, a question
    after the last answer."""
    records = [
        conversation("<image>\nwhich ?", "", image="a.png"),
        conversation("is <image> HTML ?", "<image> is not"),
        conversation("where ?", " ", "which ?", "7"),
        {"conversations": [{"from": "gpt", "value": "hello"}, *SOUND["conversations"]], "image": "a.png"},
        conversation("where ?", "here", "why ?"),
        conversation("how does the `<video>` element work ? `<audio>` does", "as <video>"),
        conversation("<div>\n<video>\n</video>\n</div>", "a page"),
    ]
    data = write(folder, records)
    file = write_recipe(stage2__data=data, stage1__data=write(folder, [SOUND], "images.jsonl"), stage3__data=data)
    stages, _ = told(file, [1, 2, 3])
    for stage in stages[1:]:
        losses = [line["loss"] for line in read_lines(stage / "log.jsonl") if "loss" in line]
        assert losses
        assert all(map(math.isfinite, losses))
        assert not (stage / "skipped.jsonl").exists()
    assert [len(record.turns) for record in load_records(data["file"], folder)] == [1, 1, 2, 1, 2, 1, 1]
    report = check_data(data["file"], folder)
    assert (report.problems, report.text_only, report.image_as_text) == ([], 5, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (conversation("what ?", "7", video="clip.mp4"), "found 0 <video> in the questions of record 0 of .*, which has a video"),
        (conversation("what ?", "7", videos=["clip.mp4"]), r"has \['clip.mp4'\] as 'videos', but a record has one video, as 'video'"),
        (conversation("<image>\nwhat ?", "7", image="a.png", audio="a.wav"), "has a.wav as 'audio'"),
        (conversation("what ?", "7", audios=[{"bytes": "x"}]), "as 'audios'"),
        (conversation("<video>\nwhat happens ?", "7"), "turn 0 of record 0 of .* has <video>, but its record has no 'video'"),
        (conversation("which ?", "7", "what happens ?\n<video>", "7"), "turn 2 of record 0 of .* has <video>"),
        (conversation("first\n <audio> \nthen", "7"), "turn 0 of record 0 of .* has <audio>"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "x"}]}, "turn 0 .*video"),
    ],
)
def test_other_media_are_named(folder, record, message):
    (folder / "data.json").write_text(json.dumps([record]))
    (problem,) = check_data(folder / "data.json", folder).problems
    assert re.search(message, problem)
    (problem,) = read_records(folder / "data.json", folder).problems
    assert re.search(message, problem)
    for key in ("video", "videos", "audio", "audios"):
        (folder / "data.json").write_text(json.dumps([conversation("where ?", "here", **{key: None}), conversation("a", "b", **{key: []})]))
        assert len(load_records(folder / "data.json", folder)) == 2


def test_empty_names(folder):
    for empty in ("", " ", "None", "none", "nan", "NaN", "null", None, [], [""], [None], ["nan", ""], math.nan, [math.nan]):
        for key in ("image", "images"):
            (folder / "data.json").write_text(json.dumps([conversation("where ?", "here", **{key: empty})]))
            (record,) = load_records(folder / "data.json", folder)
            assert record.images == (), empty
            assert check_data(folder / "data.json", folder).text_only == 1


def test_an_empty_name_beside_a_placeholder_is_a_problem(folder):
    for names, message in (("", "found 1 image tokens in record 0 of .* but 0 images"), (["a.png", ""], "must have a file name")):
        (folder / "data.json").write_text(json.dumps([conversation("<image>\nwhere ?", "here", image=names)]))
        with pytest.raises(DataError, match=message):
            load_records(folder / "data.json", folder)


def test_rows_of_tables_follow_the_same_rules(folder):
    """Rows may hold images without bytes and path, and empty names."""
    turns = [[{"from": "human", "value": "<image>\nwhere ?"}, {"from": "gpt", "value": "here"}], conversation("a", "")["conversations"]]
    red = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(red, "png")
    nothing = {"bytes": None, "path": ""}
    columns = {
        "conversations": [turns[0], turns[1], turns[1], turns[0]],
        "image": [nothing, nothing, None, None],
        "images": [[{"bytes": red.getvalue(), "path": None}], [nothing], [], [nothing, {"bytes": red.getvalue(), "path": None}]],
    }
    features = {"conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")})}
    features |= {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    parquet.write_table(table.data.table.cast(table.features.arrow_schema), folder / "table.parquet")
    records = read_records(folder / "table.parquet", folder)
    assert [len(record.images) for record in records] == [1, 0, 0]
    with records[0].images[0].open() as opened:
        assert Image.open(opened).getpixel((0, 0)) == (255, 0, 0)
    assert len(records.problems) == 1
    assert "row 3 of" in records.problems[0]
    named = datasets.Dataset.from_dict({"conversations": [turns[1]] * 3, "image": ["", "nan", None], "video": [None] * 3})
    named.to_parquet(folder / "named.parquet")
    assert [record.images for record in load_records(folder / "named.parquet", folder)] == [(), (), ()]


def test_unreadable_lines(folder):
    good = json.dumps(conversation("a", "b")).encode()
    deep, long = b"[" * 100_000, b'{"id": ' + b"1" * 5000 + b"}"
    (folder / "data.jsonl").write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b"{", b'{"a": "\xff"}', deep, long, good]))
    records = read_records(folder / "data.jsonl", folder)
    assert len(records) == 2
    assert [int(re.search(r"line (\d)", problem)[1]) for problem in records.problems] == [2, 3, 4, 5]
    assert len(check_data(folder / "data.jsonl", folder).problems) == 4
    for text in (b"no data\n at all", b"{" * 9, b"\xff\xfe{\x00"):
        (folder / "data.jsonl").write_bytes(text)
        with pytest.raises(DataError, match="is neither a JSON list nor JSON lines: line 1"):
            read_records(folder / "data.jsonl", folder)
    (folder / "data.json").write_bytes(b"[" + deep)
    with pytest.raises(DataError, match="is not JSON"):
        read_records(folder / "data.json", folder)


def set_template(base, folder, template):
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_template_for_strings_trains_and_chats(tiny_base, write_recipe, tmp_path):  # noqa: F811
    """The saved template takes parts, also with transformers' own processor."""
    base = set_template(tiny_base / "base", tmp_path / "strings", QWEN_2_5)
    (stage,), _ = told(write_recipe(model=str(base)), [1])
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where ?"}]}]
    for processor in (AutoProcessor.from_pretrained(stage), load_processor(base)):
        text = processor.apply_chat_template(question, add_generation_prompt=True)
        assert text.endswith("<|im_start|>user\n<image>\nwhere ?<|im_end|>\n<|im_start|>assistant\n")
        assert processor.tokenizer.chat_template == processor.chat_template
    image = next((tiny_base / "data" / "images").rglob("*.png"))
    for folder in (stage, base):
        done = run_here("chat", folder, "where ?", "--image", image, "--max-new-tokens", "2")
        assert done.exit_code == 0, done.output


def test_a_template_without_a_place_for_images_is_refused_before_stage_one(tiny_base, write_recipe, tmp_path):  # noqa: F811
    nothing = "{% for message in messages %}{{ message['role'] }}{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}"
    base = set_template(tiny_base / "base", tmp_path / "nothing", nothing)
    with pytest.raises(DataError, match="the model's own chat template cannot ask about an image"):
        told(write_recipe(model=str(base)), [1])
    assert not (tmp_path / "run").exists()
    data = ("check", tiny_base / "data" / "train.json", "--images", tiny_base / "data" / "images")
    assert "cannot ask about an image" in refused(*data, "--model", base)


def test_a_language_model_alone_counts_tokens(tiny_base, tmp_path):  # noqa: F811
    """So does a tokenizer alone. Both count what the LLaVA counts, except for the image."""
    language, tokenizer = tmp_path / "language", tmp_path / "tokenizer"
    for folder, config in ((language, {"model_type": "llama", "vocab_size": 99}), (tokenizer, None)):
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_bytes((tiny_base / "base" / name).read_bytes())
        if config:
            (folder / "config.json").write_text(json.dumps(config))
    data = ("check", tiny_base / "data" / "train.json", "--images", tiny_base / "data" / "images", "--json")
    whole, *alone = (run_here(*data, "--model", folder) for folder in (tiny_base / "base", language, tokenizer))
    counted = json.loads(whole.stdout)
    for done in alone:
        found = json.loads(done.stdout)
        assert "an image counts as one token" in done.stderr
        assert found["targets"] == counted["targets"]
        assert found["tokens"] == counted["tokens"] - 35 * counted["records"]
    (language / "chat_template.jinja").unlink()
    assert "has no chat template: name one of phi" in refused(*data, "--model", language)
    assert run_here(*data, "--model", language, "--template", "chatml").exit_code == 0
    (language / "tokenizer.json").unlink()
    assert "has no tokenizer files" in refused(*data, "--model", language)
    assert "is not a folder" in refused(*data, "--model", tmp_path / "none")


@pytest.mark.parametrize("template", [GEMMA_2, MISTRAL])
def test_records_that_a_template_refuses_are_listed(folder, tiny_base, template):  # noqa: F811
    base = set_template(tiny_base / "base", folder / "base", template)
    spoken = {"conversations": [{"from": "system", "value": "be brief ."}, *SOUND["conversations"]], "image": "a.png"}
    (folder / "data.json").write_text(json.dumps([SOUND, spoken, SOUND]))
    done = run_here("check", folder / "data.json", "--images", folder, "--model", base)
    assert done.exit_code == 1
    message = "System role not supported" if template == GEMMA_2 else "Conversation roles must alternate"
    assert f"record 1 of {folder / 'data.json'}: the chat template refuses it: {message}" in done.stdout
