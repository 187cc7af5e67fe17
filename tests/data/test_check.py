"""`moe-llava check`: every problem, by file and record; lengths and padding, counted."""

import json

import pytest
from PIL import Image

from moe_llava.data.check import Report, check_data
from moe_llava.data.encode import encode_record, encode_within
from moe_llava.digits.tokenizer import build_tokenizer
from tests.conftest import refused, run_here
from tests.training.conftest import tiny_base  # noqa: F401


def conversation(*values, **keys):
    return {"conversations": [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)], **keys}


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    records = [
        conversation("<image>\nwhere is the red 7 ?", "top-left", image="a.png"),
        conversation("is there a red 7 ?", "yes", "how many digits are there ?", "2"),
        conversation("<image>\nwhere ?", "here", image="gone.png"),
        conversation("<image>\nwhere ?", "here", image="broken.png"),
        conversation("where ?", "here", image="a.png"),
        {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "hi"}]},
        conversation("where ?", "here", video="a.mp4"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


PROBLEMS = {
    2: "gone.png, which does not exist",
    3: "broken.png, which cannot be decoded",
    4: "found 0 image tokens",
    5: "must be a text from 'human'",
    6: "found 0 <video> in the questions of record 6",
}


def test_every_problem_is_found(data):
    report = check_data(data / "data.json", data)
    assert report.records == 7
    assert report.text_only == 1
    assert len(report.problems) == len(PROBLEMS)
    for problem, (record, what) in zip(report.problems, PROBLEMS.items(), strict=True):
        assert f"record {record} of" in problem
        assert what in problem


def measured(tokenizer, limit=None):
    """Count 36 tokens for an image."""
    return lambda record, sizes: encode_within(record, tokenizer, None, 36, limit)


def test_lengths_are_those_of_training(data):
    tokenizer = build_tokenizer()
    report = check_data(data / "data.json", data, measured(tokenizer))
    records = json.loads((data / "data.json").read_text())
    assert report.lengths == [len(encode_record(record, tokenizer, image_tokens=36)["input_ids"]) for record in records[:2]]
    assert report.targets == 2 + 4  # one word and its end; two of them


def test_the_limit(data):
    report = check_data(data / "data.json", data, measured(build_tokenizer(), 30))
    assert report.cut == 0  # what the limit spoils is a problem
    longest = max(check_data(data / "data.json", data, measured(build_tokenizer())).lengths)
    assert check_data(data / "data.json", data, measured(build_tokenizer(), longest - 1)).cut == 1
    assert max(report.lengths) <= 30
    assert any("an image goes beyond the limit of 30" in problem for problem in report.problems)


def test_padding_and_histogram():
    report = Report(lengths=[10, 2, 8, 8])
    assert report.padding(2) == pytest.approx(1 - 28 / 36)
    assert report.padding(1) == 0
    assert report.histogram() == {"2-2": 1, "5-8": 2, "9-16": 1}
    assert Report().padding(4) == 0


def test_the_command(data, tiny_base):  # noqa: F811
    result = run_here("check", data / "data.json", "--images", data, "--model", tiny_base / "base", "--json")
    assert run_here("check", data / "data.json", "--model", tiny_base / "base", "--json").stdout == result.stdout  # images beside the file
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert len(found["problems"]) == 5
    assert found["records"] == 7
    assert 0 <= found["padding"] < 1
    good = run_here("check", tiny_base / "data" / "train.json", "--images", tiny_base / "data" / "images", "--model", tiny_base / "base")
    assert good.exit_code == 0, good.output
    assert "problems 0" in good.stdout
    assert "tokens  #" in good.stdout
    assert "none.json does not exist" in refused("check", data / "none.json")
    assert "nowhere, which is no folder" in refused("check", data / "data.json", "--images", data / "nowhere")
    bad = data / "bad.json"
    bad.write_text(json.dumps([{"id": str(number), "conversations": []} for number in range(25)]))
    told = run_here("check", bad).stdout.splitlines()
    assert [line for line in told if "bad.json" in line] == told[:20]
    assert told[20] == "and 5 more, which --json lists"
    assert "must be one of phi" in refused("check", data / "data.json", "--template", "fi")
