"""Records with a video: their rules, and how they are stored."""

import json
import re

import datasets
import pytest
from PIL import Image

from moe_llava.common.errors import DataError
from moe_llava.data.check import check_data
from moe_llava.data.encode import encode_record
from moe_llava.data.store import load_records, read_records
from moe_llava.digits.tokenizer import build_tokenizer


def conversation(*values, **keys):
    return {"conversations": [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)], **keys}


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 6), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "clip.mp4").write_bytes(b"not read here")
    return tmp_path


def write(folder, *records):
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json", folder


FRAMES = ["0.png", "1.png", "2.png"]
PARTS = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
    {"role": "assistant", "content": "Nothing."},
]


def test_a_video_is_a_file_or_frames(folder):
    expected = [
        conversation("<video>\nWhat happens?", "Nothing.", video=FRAMES),
        conversation("What happens in\n<video>", "Nothing.", "And `<image>`?", "Text.", video="clip.mp4", id="x"),
        {"messages": PARTS, "video": "clip.mp4"},
        conversation("What?", "Nothing."),
        conversation("<image>\nWhat?", "Red.", image="0.png", video=None),
    ]
    records = load_records(*write(folder, *expected))
    frames, file, parts, text, image = records
    assert frames.video == tuple(folder / name for name in FRAMES)
    assert file.video == parts.video == folder / "clip.mp4"
    assert text.video is None
    assert image.video is None
    assert file.extra == {"id": "x"}
    assert parts.turns == frames.turns
    assert frames.messages()[0] == {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}
    assert file.messages()[2]["content"] == [{"type": "text", "text": "And `<image>`?"}]
    assert records.has_video().tolist() == [True, True, True, False, False]
    assert records.has_video_file().tolist() == [False, True, True, False, False]
    assert [len(record.files) for record in records] == [3, 1, 1, 0, 1]
    assert records.image_counts().tolist() == [0, 0, 0, 0, 1]
    assert records.lengths(10, 100).tolist() == [len("".join(record.turns[0])) // 4 + 100 for record in (frames,)] + [
        sum(len(text) for turn in record.turns for text in turn) // 4 + extra
        for record, extra in zip(list(records)[1:], (100, 100, 0, 10), strict=True)
    ]
    assert len(set(records.shapes().tolist())) == 4  # `frames` and `parts` look alike


def test_rows_of_tables(folder):
    turns = conversation("<video>\nWhat?", "This.")["conversations"]
    datasets.Dataset.from_dict({"conversations": [turns] * 2, "video": [FRAMES, FRAMES[:1]]}).to_parquet(folder / "frames.parquet")
    datasets.Dataset.from_dict({"conversations": [turns], "video": ["clip.mp4"]}).to_parquet(folder / "files.parquet")
    assert [len(record.video) for record in load_records(folder / "frames.parquet", folder)] == [3, 1]
    assert load_records(folder / "files.parquet", folder)[0].video == folder / "clip.mp4"


def test_the_digest_depends_on_the_video(folder):
    digests = [
        load_records(*write(folder, conversation("<video>\nWhat?", "This.", video=video))).digest()
        for video in (FRAMES, FRAMES[:2], "clip.mp4")
    ]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (conversation("<video>\nWhat?", "y", video="gone.mp4"), "record 0 of .* names the video .*gone.mp4, which does not exist"),
        (
            conversation("<video>\nWhat?", "y", video=["0.png", "gone.png"]),
            "record 0 of .* names the image .*gone.png, which does not exist",
        ),
        (conversation("What?", "y", video="clip.mp4"), "found 0 <video> in the questions of record 0 of .*, but must find one"),
        (conversation("<video><video>\nWhat?", "y", video="clip.mp4"), "found 2 <video> in the questions of record 0 of"),
        (conversation("<image>\nWhat?", "y", video="clip.mp4"), "found 0 <video> in the questions of record 0 of"),
        (conversation("<video>\nWhat?", "a <video>", video="clip.mp4"), "turn 1 of record 0 of .* is an answer with <video>"),
        (conversation("<video>\nWhat?", "y", video="clip.mp4", system="<video>"), "a text without <video> as its system prompt"),
        (
            conversation("<video> <audio>\nWhat?", "y", video="clip.mp4"),
            "turn 0 of record 0 of .* has <audio>, but models here read no audio",
        ),
        (
            conversation("<image><video>\nWhat?", "y", video="clip.mp4", image="0.png"),
            "record 0 of .* has images and a video, clip.mp4, but",
        ),
        (conversation("<video>\nWhat?", "y", video=5), "a list of the file names of its frames as 'video', but has 5"),
        (conversation("<video>\nWhat?", "y", video=["0.png", ""]), "file names of its frames as 'video', but has"),
        (conversation("<video>\nWhat?", "y"), "turn 0 of record 0 of .* has <video>, but its record has no 'video'"),
        (conversation("<video>\nWhat?", "y", video=""), "turn 0 of record 0 of .* has <video>, but its record has no 'video'"),
        (conversation("<video>\nWhat?", "y", video_path="clip.mp4"), "has clip.mp4 as 'video_path', but a record has one video"),
    ],
)
def test_bad_records(folder, record, message):
    (problem,) = read_records(*write(folder, record)).problems
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (["0.png", "broken.png"], "record 0 of .* names the image .*broken.png, which cannot be decoded"),
        (["0.png", "small.png"], "record 0 of .* names the frame .*small.png of 4 x 4 pixels, but the first frame has 8 x 6"),
    ],
)
def test_check_decodes_frames(folder, video, message):
    report = check_data(*write(folder, conversation("<video>\nWhat?", "y", video=video), conversation("<video>\nWhat?", "y", video=FRAMES)))
    (problem,) = report.problems
    assert re.search(message, problem)
    assert (report.records, report.videos, report.text_only) == (2, 1, 0)


def test_a_video_needs_a_processor():
    with pytest.raises(DataError, match="its video becomes tokens only by the processor of a model that takes videos"):
        encode_record(conversation("<video>\nwhere ?", "here", video="a.mp4"), build_tokenizer())
