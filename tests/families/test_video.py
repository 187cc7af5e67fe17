"""Videos are encoded, trained on and answered about as each family's own processor and model do."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.common.errors import DataError
from moe_llava.data.batches import Collator, ConversationDataset
from moe_llava.data.check import check_data
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.data.rendering import make_portable
from moe_llava.data.store import read_records
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.common.test_videos import write_video
from tests.families.processors import ROWS, tiny_model, tiny_processor
from tests.families.test_processors import answers, check_packing
from tests.families.test_training import check_same_weights, write_recipe  # noqa: F401
from tests.training.conftest import stopping  # noqa: F401

FAMILIES = ("qwen3_vl", "llava_onevision", "smolvlm")
WITHOUT = sorted(family for family in ROWS if ROWS[family].videos is None)
QUIET = Console(quiet=True)


def portable(family):
    made = tiny_processor(family)
    made.chat_template = made.tokenizer.chat_template = make_portable(made.chat_template, made.tokenizer, made.image_token)
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return portable(family)


def draw(number, size=(48, 32)):
    """A square that moves."""
    image = Image.new("RGB", size, (30 * number, 200, 90))
    image.paste((250, 30, 60), (2 * number, 3, 2 * number + 8, 18))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(6):
        draw(number).save(folder / f"{number}.png")
    for number in range(4):
        draw(number, (30, 40)).save(folder / f"tall-{number}.png")
    return folder


def frames(folder, name="", number=6):
    return tuple(folder / f"{name}{index}.png" for index in range(number))


@pytest.fixture(scope="module")
def records(folder):
    return [
        Record("one", (("<video>\nWhat is in the picture?", "A red square."), ("Where?", "Here, above.")), video=frames(folder)),
        Record("two", (("Is one wide?\n<video>", "One is wide."),), video=frames(folder, "tall-", 4)),
        Record("image", (("<image>\nWhat?", "A red square."),), (folder / "0.png",)),
        Record("text", (("Is <video> or <|video_pad|> a token?", "No."),)),
    ]


def expected_of(processor, record, pictures, fps, **template):
    """What the processor makes of a conversation, when it samples the frames itself. One that does not is given the frames of `uniform`."""
    settings = processor.video_processor
    samples = any(getattr(settings, name, None) for name in ("do_sample_frames", "fps", "num_frames"))
    if not samples:
        pictures = [pictures[index] for index in np.linspace(0, len(pictures) - 1, 32).round().astype(int)]
    video = np.stack([np.asarray(picture) for picture in pictures])
    metadata = {"total_num_frames": len(video), "fps": fps, "duration": fps and len(video) / fps, "frames_indices": list(range(len(video)))}
    messages = record.messages()
    part = next(part for part in messages[0]["content"] if part["type"] == "video")
    part["video"] = video
    return processor.apply_chat_template(
        messages,
        **{"chat_template": processor.chat_template} | template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata], "do_sample_frames": samples},
    )


def assert_same(item, expected):
    assert torch.equal(item["input_ids"], expected["input_ids"][0])
    assert item.keys() - {"labels"} == expected.keys() - {"attention_mask"}
    for name in item.keys() - {"labels", "input_ids"}:
        found = item[name][None] if name.endswith("token_type_ids") else item[name]
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected[name])), name


def test_ids_and_pixels_of_frames_are_those_of_the_processor(processor, records):
    encoder = Encoder(processor)
    assert encoder.video_problem == ""
    for record in records[:2]:
        pictures = [Image.open(path) for path in record.video]
        assert_same(encoder(record), expected_of(processor, record, pictures, processor.video_processor.fps))
    measured, was_cut = encoder.measure(records[0], [])
    assert measured["input_ids"] == encoder(records[0])["input_ids"].tolist()
    assert not was_cut


def test_ids_and_pixels_of_a_file_are_those_of_the_processor(processor, tmp_path):
    """Only the frames that the model sees are decoded; the processor gets them all, and samples itself."""
    av = pytest.importorskip("av")
    encoder, turns = Encoder(processor), (("<video>\nWhat is in the picture?", "A red square."),)
    for suffix, number in (("mp4", 12), ("mkv", 21)):
        file = write_video(tmp_path / f"clip.{suffix}", number=number, fps=5)
        record = Record("file", turns, video=file)
        with av.open(str(file)) as container:
            pictures = [frame.to_image() for frame in container.decode(video=0)]
        assert_same(encoder(record), expected_of(processor, record, pictures, 5.0))
        assert encoder.measure(record, [])[0]["labels"] == encoder(record)["labels"].tolist()


def test_check_counts_videos(processor, data, tmp_path):
    """Their tokens are those of training. A file that cannot be decoded is named."""
    pytest.importorskip("av")
    lines = json.loads((data / "train.json").read_text())[:3]
    for name, video in (("clip.mp4", write_video(data / "clip.mp4")), ("text.mp4", data / "text.mp4")):
        lines.append(conversation("<video>\nWhat?", "A.", video=name))
        if not video.exists():
            video.write_bytes(b"no video")
    (tmp_path / "data.json").write_text(json.dumps(lines))
    encoder = Encoder(processor)
    for measure in (None, encoder.measure):
        report = check_data(tmp_path / "data.json", data, measure)
        (problem,) = report.problems
        assert "record 4 of" in problem
        assert "text.mp4, which cannot be decoded" in problem
        assert (report.records, report.videos, report.images, report.text_only) == (5, 2, 1, 1)
    records = read_records(tmp_path / "data.json", data)
    assert report.lengths == [len(encoder(records[index])["labels"]) for index in range(4)]


def test_labels_are_the_answers(processor, records):
    found = answers(processor, Encoder(processor)(records[0]))
    assert [text.strip().startswith(answer) for text, answer in zip(found, ("A red square.", "Here, above."), strict=True)] == [True, True]


def test_the_template_of_smolvlm(records):
    """The one in transformers, which its processor takes for videos, whatever its own is."""
    processor = tiny_processor("smolvlm")
    portable_template = make_portable(DEFAULT_CHAT_TEMPLATE, processor.tokenizer, processor.image_token)
    processor.chat_template = processor.tokenizer.chat_template = portable_template
    pictures = [Image.open(path) for path in records[0].video]
    expected = expected_of(processor, records[0], pictures, processor.video_processor.fps, chat_template=None)
    assert_same(Encoder(processor)(records[0]), expected)


@pytest.mark.parametrize("template", ["chatml", "v1"])
def test_a_named_template(processor, records, template):
    """The video has the tokens that it has in the model's own template, and the answers are found."""
    own, named = Encoder(processor)(records[0]), Encoder(processor, template)(records[0])
    token = getattr(processor, "video_token_id", None) or processor.image_token_id  # SmolVLM has the same for both
    assert (own["input_ids"] == token).sum() == (named["input_ids"] == token).sum() > 0
    assert [text.strip()[:5] for text in answers(processor, named)] == ["A red", "Here,"]


def test_the_template_plain_takes_no_video(processor, records):
    with pytest.raises(DataError, match="one: the template 'plain' takes an image and its caption, but the record has a video"):
        Encoder(processor, "plain")(records[0])


def test_a_cut_through_a_video_is_refused(processor, records):
    with pytest.raises(DataError, match=r"one has \d+ tokens, and a video goes beyond the limit of 20"):
        Encoder(processor, max_length=20)(records[0])


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_without_videos_is_refused_by_name(name, records):
    encoder = Encoder(portable(name))
    for refused in (encoder, encoder.check_rendering, lambda record: encoder.measure(record, [])):
        with pytest.raises(DataError, match=rf"one has a video, but the model's {type(encoder.processor).__name__} takes no videos"):
            refused(records[0])


def test_a_processor_that_fails_on_videos_is_named(records, monkeypatch):
    processor = portable("qwen3_vl")

    def fail(*_, **__):
        raise KeyError("pixel_values_videos")

    monkeypatch.setattr(processor.video_processor, "preprocess", fail)
    encoder = Encoder(processor)
    with pytest.raises(DataError, match="one has a video, but the model's Qwen3VLProcessor fails on one: 'pixel_values_videos'"):
        encoder(records[0])
    assert len(encoder(records[2])["input_ids"])


def test_a_template_without_videos_is_refused(records):
    processor = tiny_processor("qwen3_vl")
    jinja = processor.chat_template.replace("<|video_pad|>", "")
    processor.chat_template = processor.tokenizer.chat_template = jinja
    with pytest.raises(DataError, match=r"one has a video, but the model's own chat template cannot ask about a video"):
        Encoder(processor)(records[0])


def test_a_batch_computes_what_its_rows_compute(family, processor, records):
    """Videos of several sizes, images and text in one batch. Dense and sparse agree, and gradients reach the experts."""
    encoder = Encoder(processor)
    items = [encoder(record) for record in records]
    dense = tiny_model(family, processor)
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    collate = Collator(encoder.nothing())
    batch = collate(items)
    with torch.no_grad():
        found = dense(**batch).logits
        scale = found.abs().max()
        assert (sparse(**batch).logits - found).abs().max() <= 1e-5 * scale
        for row, item in enumerate(items):
            alone = dense(**collate([item])).logits
            assert (found[row, : alone.shape[1]] - alone[0]).abs().max() <= 2e-5 * scale
    prompt = {name: value for name, value in collate([items[0]]).items() if name != "labels"}
    generated = [model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (dense, sparse)]
    assert torch.equal(*generated)
    sparse.train()(**batch, output_router_logits=True).loss.backward()
    assert all(mlp.experts.down_proj.grad.any() for mlp in sparse.model.sparse_mlps().values())


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_5"])
def test_other_families_compute_the_same_sparse_and_dense(name, records):
    processor = portable(name)
    encoder, dense = Encoder(processor), tiny_model(name, processor)
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    batch = Collator(encoder.nothing())([encoder(record) for record in records])
    with torch.no_grad():
        found = dense(**batch).logits
        assert (sparse(**batch).logits - found).abs().max() <= 1e-5 * found.abs().max()


def test_the_frames_matter(family, processor, records):
    """Another video gives other logits: features reach the language model."""
    encoder, dense = Encoder(processor), tiny_model(family, processor)
    item = encoder(records[0])
    name = next(name for name in ("pixel_values_videos", "pixel_values") if name in item)
    collate = Collator(encoder.nothing())
    with torch.no_grad():
        first, second = (dense(**collate([item | {name: value}])).logits for value in (item[name], item[name].flip(-1)))
    assert (first - second).abs().max() > 1e-3


def test_tokens_of_a_video_are_routed_as_tokens_of_images(family, processor, records):
    encoder = Encoder(processor)
    sparse = upcycle(tiny_model(family, processor), num_experts=4, num_experts_per_tok=2, routing="modality_split")
    item = encoder(records[0])
    with torch.no_grad():
        output = sparse(**Collator(encoder.nothing())([item]), output_router_logits=True)
    logits = output.router_logits[0].reshape(-1, 4)
    features = torch.isfinite(logits[:, :2]).all(1) & (logits[:, :2] > torch.finfo(logits.dtype).min / 2).all(1)
    placeholder = getattr(processor, "video_token_id", None) or processor.image_token_id  # SmolVLM has the same for both
    assert torch.equal(features, item["input_ids"] == placeholder)


def conversation(question, answer, **keys):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **keys}


@pytest.fixture(scope="module")
def data(folder):
    """Records with videos, images and text."""
    lines = []
    for number in range(4):
        video = [path.name for path in (frames(folder, number=6 - number % 2) if number % 2 else frames(folder, "tall-", 4))]
        lines.append(conversation("<video>\nWhat is in the picture?", "A red square. " * (1 + number), video=video))
        lines.append(conversation("<image>\nWhat?", "A blue circle.", image="0.png"))
        lines.append(conversation("Where?", "Here."))
    (folder / "train.json").write_text(json.dumps(lines))
    return folder


def test_stages_train_on_videos_and_resume(family, write_recipe, data, tmp_path, stopping):  # noqa: F811
    """Stage I has records with videos alone; stage III resumes to the same weights."""
    videos = [line for line in json.loads((data / "train.json").read_text()) if "video" in line]
    (tmp_path / "videos.json").write_text(json.dumps(videos))
    one = {
        "optimisation": {
            "learning_rate": 1e-2,
            "batch_size": 2,
            "per_device_batch_size": 2,
            "max_steps": 2,
            "warmup_ratio": 0.0,
            "group_by_length": True,
        }
    }
    one["data"] = {"file": str(tmp_path / "videos.json"), "images": str(data)}
    settings = {"stage1": one, "stage3__data": {"file": str(data / "train.json"), "images": str(data)}, "steps": 3}
    aligned, whole = train(load_recipe(write_recipe(family, output=str(tmp_path / "whole"), **settings)), [1, 3], False, QUIET)
    recipe = load_recipe(write_recipe(family, **settings))
    train(recipe, [1], False, QUIET)
    with stopping(2):
        train(recipe, [3], False, QUIET)
    (resumed,) = train(recipe, [3], True, QUIET)
    check_same_weights(whole, resumed)
    losses = [json.loads(line)["loss"] for line in (whole / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    before, _ = load_checkpoint(aligned, dtype=torch.float32)
    base, _ = load_checkpoint(tmp_path / "base", dtype=torch.float32)
    assert any(not torch.equal(value, base.state_dict()[name]) for name, value in before.state_dict().items())


def test_settings_of_videos(write_recipe, data, tmp_path):  # noqa: F811
    settings = {"stage3__data": {"file": str(data / "train.json"), "images": str(data)}}
    (whole,) = train(load_recipe(write_recipe("qwen3_vl", **settings, stage3__video_processor={"max_frames": 4})), [3], False, QUIET)
    _, processor = load_checkpoint(whole)
    assert processor.video_processor.max_frames == 4
    _, before = load_checkpoint(tmp_path / "base")
    record = Record("r", (("<video>\nWhat?", "A."),), video=frames(data))
    assert [Encoder(each)(record)["video_grid_thw"][0, 0].item() for each in (processor, before)] == [2, 3]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_vl", {"max_frame": 4}, r"video_processor.max_frame is no setting .*; did you mean max_frames\?"),
        ("llava", {"fps": 1}, "video_processor is {'fps': 1}, but the model's .*LlavaProcessor has none"),
    ],
)
def test_wrong_settings_of_videos(write_recipe, monkeypatch, tmp_path, name, settings, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        train(load_recipe(write_recipe(name, stage3__video_processor=settings)), [3], resume=False, console=QUIET)


def test_bad_videos_are_records_left_out(family, write_recipe, data, tmp_path):  # noqa: F811
    """A frame that cannot be decoded is found during training, and named."""
    (data / "broken.png").write_bytes(b"no image")
    lines = [*json.loads((data / "train.json").read_text()), conversation("<video>\nWhat?", "A.", video=["0.png", "broken.png"])]
    (tmp_path / "bad.json").write_text(json.dumps(lines))
    file = write_recipe(
        family,
        stage3__data={"file": str(tmp_path / "bad.json"), "images": str(data)},
        on_bad_record="skip",
        stage3__optimisation__max_steps=5,
    )
    (stage,) = train(load_recipe(file), [3], False, QUIET)
    (line,) = [json.loads(line) for line in (stage / "skipped.jsonl").read_text().splitlines()]
    assert "record 12 of" in line["problem"]
    assert "broken.png, which cannot be decoded" in line["problem"]


def test_files_without_a_decoder_are_refused_before_training(write_recipe, data, tmp_path, monkeypatch):  # noqa: F811
    (data / "clip.mp4").write_bytes(b"not read")
    (tmp_path / "files.json").write_text(json.dumps([conversation("<video>\nWhat?", "A.", video="clip.mp4")]))
    file = write_recipe("qwen3_vl", stage3__data={"file": str(tmp_path / "files.json"), "images": str(data)}, on_bad_record="skip")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"record 0 of .*clip.mp4, but a video file needs av, which is not installed: pip install"):
        train(load_recipe(file), [3], False, QUIET)


@pytest.mark.parametrize("name", ["llava_onevision", "smolvlm"])
def test_packed_videos_compute_what_padded_ones_do(name, records):
    check_packing(name, portable(name), records)


def test_datasets_hold_problems(processor, data):
    record = Record("bad", (("<video>\nWhat?", "A."),), video=(data / "gone.png",))
    item = ConversationDataset([record], Encoder(processor))[0]
    assert item == {"problem": f"bad names the image {data / 'gone.png'}, which does not exist"}
