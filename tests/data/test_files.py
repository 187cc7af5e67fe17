"""Every kind of data file yields the same records, whatever its size; folders of `datasets` hold images in their rows."""

import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.data import files, store
from moe_llava.data.check import check_data
from moe_llava.data.files import read_items
from moe_llava.data.store import joined, load_records, weighted

ITEMS = [
    {"conversations": [{"from": "human", "value": f"Größe {n}?" + "x" * n}, {"from": "gpt", "value": '"}],\\n['}], "id": n, "score": n / 7}
    for n in range(40)
]


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(files, "CHUNK", chunk)
    file = tmp_path / "list.json"
    file.write_text(json.dumps(ITEMS, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [item for _, item in read_items(file)] == ITEMS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1} {"b": 2}]', r"expected ',', but found '{' \(character 10\)"),
        ('[{"a": 1}, {"b": }]', r"is not JSON: Expecting value \(character 17\)"),
        ('[{"a": 1},', "is not JSON"),
        ('[{"a": "1', "is not JSON: Unterminated string"),
        ('[{"a": 1}', r"expected ',', but found 'the end of the file'"),
        ('[{"a": 1}] [{"b": 2}]', r"something comes after the end of the list \(character 11\)"),
        ("[] garbage", r"something comes after the end of the list \(character 3\)"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_an_error_in_a_list_names_the_position(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_items(tmp_path / "list.json"))


def picture(colour):
    opened = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(opened, "png")
    return {"bytes": opened.getvalue(), "path": None}


def messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def save_table(folder, form):
    """Save three rows: with one image, none, two."""
    pictures = [[picture("red")], [], [picture("green"), picture("blue")]]
    talks = [messages("<image>\nWhat?", "Red."), messages("Hello", "Hi"), messages("<image><image>\nWhich?", "Both.")]
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(
        {"messages": datasets.List(turn), "images": datasets.List(datasets.Image()), "id": datasets.Value("int32")}
    )
    table = datasets.Dataset.from_dict({"messages": talks, "images": pictures, "id": [0, 1, 2]}, features=features)
    if form == "saved":
        table.save_to_disk(folder)
    elif form == "shuffled":
        table.select([2, 1, 0]).select([2, 1, 0]).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")


@pytest.mark.parametrize("form", ["saved", "shuffled", "parquet"])
def test_a_folder_of_datasets(tmp_path, form):
    save_table(tmp_path / "table", form)
    records = load_records(tmp_path / "table", tmp_path)
    assert [record.turns for record in records] == [
        (("<image>\nWhat?", "Red."),),
        (("Hello", "Hi"),),
        (("<image><image>\nWhich?", "Both."),),
    ]
    assert [record.extra for record in records] == [{"id": 0}, {"id": 1}, {"id": 2}]
    colours = [[open_image(image, "x").getpixel((0, 0)) for image in record.images] for record in records]
    assert colours == [[(255, 0, 0)], [], [(0, 128, 0), (0, 0, 255)]]
    assert records.image_counts().tolist() == [1, 0, 2]
    report = check_data(tmp_path / "table", tmp_path)
    assert (report.records, report.images, report.text_only, report.problems) == (3, 3, 1, [])


def test_a_folder_with_one_image_a_row(tmp_path):
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features({"conversations": datasets.List(turn), "image": datasets.Image()})
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    text = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    table = datasets.Dataset.from_dict({"conversations": [talk, text], "image": [picture("red"), None]}, features=features)
    table.save_to_disk(tmp_path / "table")
    one, none = load_records(tmp_path / "table", tmp_path)
    assert open_image(one.images[0], one.source).getpixel((0, 0)) == (255, 0, 0)
    assert none.images == ()


def test_an_image_of_a_row_that_cannot_be_decoded_is_named(tmp_path):
    save_table(tmp_path / "table", "saved")
    broken = datasets.load_from_disk(tmp_path / "table").cast_column("images", datasets.List(datasets.Image(decode=False)))
    broken = broken.map(lambda row: {"images": [{"bytes": b"no image", "path": None} for _ in row["images"]]})
    broken.save_to_disk(tmp_path / "broken")
    report = check_data(tmp_path / "broken", tmp_path)
    assert len(report.problems) == 2
    assert f"row 2 of {tmp_path / 'broken'} names the image 0 of row 2 of" in report.problems[1]


def test_folders_without_a_table(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is no folder of `datasets`"):
        load_records(tmp_path / "empty", tmp_path)
    save_table(tmp_path / "one", "saved")
    datasets.DatasetDict({"train": datasets.load_from_disk(tmp_path / "one")}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match=r"dict holds several tables: name one of .*dict/train"):
        load_records(tmp_path / "dict", tmp_path)
    assert len(load_records(tmp_path / "dict" / "train", tmp_path)) == 3


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(store, "read_items", lambda file: read.append(file) or read_items(file))
    file = tmp_path / "list.json"
    file.write_text(json.dumps(ITEMS))
    first = load_records(file, tmp_path)
    assert list(load_records(file, tmp_path)) == list(first)
    assert len(read) == 1
    file.write_text(json.dumps(ITEMS[:5]))
    assert len(load_records(file, tmp_path)) == 5
    os.utime(file, ns=(1, 1))
    load_records(file, tmp_path)
    assert len(read) == 3


def test_an_image_that_went_missing_after_the_first_reading(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "y"}]
    (tmp_path / "list.json").write_text(json.dumps([{"conversations": talk, "image": "a.png"}] * 2))
    assert len(load_records(tmp_path / "list.json", tmp_path)) == 2
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / "list.json", tmp_path)
    assert str(caught.value).count("a.png, which does not exist") == 2


def test_joined_files(tmp_path):
    """Rows of several files are one sequence, with their lengths: a token for four characters, 10 for an image."""
    save_table(tmp_path / "table", "saved")
    (tmp_path / "list.json").write_text(json.dumps(ITEMS))
    table, listed = load_records(tmp_path / "table", tmp_path), load_records(tmp_path / "list.json", tmp_path)
    both = joined([weighted(table, 2, 0), listed[3:5]])
    assert list(both) == [*table, *table, listed[3], listed[4]]
    texts = ["".join(text for turn in record.turns for text in turn) for record in both]
    expected = [len(text) // 4 + 10 * len(record.images) for text, record in zip(texts, both, strict=True)]
    assert np.array_equal(both.lengths(10, 0), expected)


@pytest.mark.parametrize("before", ["\n", " ", "\ufeff"])
def test_a_list_may_begin_late(tmp_path, before):
    (tmp_path / "list.json").write_text(before + json.dumps(ITEMS), encoding="utf-8")
    assert len(load_records(tmp_path / "list.json", tmp_path)) == len(ITEMS)


@pytest.mark.parametrize("look", [load_records, check_data])
def test_a_file_that_is_not_utf_8(tmp_path, look):
    (tmp_path / "latin.json").write_bytes('[{"conversations": "Größe"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.json is no text in UTF-8"):
        look(tmp_path / "latin.json", tmp_path)


def test_half_a_character(tmp_path):
    item = {"conversations": [{"from": "human", "value": "half: \ud800"}, {"from": "gpt", "value": "y"}]}
    (tmp_path / "half.json").write_text(json.dumps([item]))
    with pytest.raises(DataError, match=r"record 0 of .*half.json holds half of a character, '\\ud800', which is no text"):
        load_records(tmp_path / "half.json", tmp_path)
    assert len(check_data(tmp_path / "half.json", tmp_path).problems) == 1


def test_a_parquet_file(tmp_path):
    save_table(tmp_path / "table", "parquet")
    records = load_records(tmp_path / "table" / "data" / "train-00000-of-00001.parquet", tmp_path)
    assert open_image(records[2].images[1], "x").getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"broken.parquet is no folder of `datasets`"):
        load_records(tmp_path / "broken.parquet", tmp_path)


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("form", ["bytes", "mapping"])
def test_a_parquet_file_of_others(tmp_path, key, form):
    """Not written by `datasets`, so its columns have no type `Image`. Shards are read in the same way."""
    image = picture("red") if form == "mapping" else picture("red")["bytes"]
    rows = [{"messages": messages("<image>What?", "Red."), key: [image] if key == "images" else image}]
    rows.append({"messages": messages("What?", "Nothing."), key: None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    one, none = load_records(tmp_path / "x.parquet", tmp_path)
    assert open_image(one.images[0], one.source).getpixel((0, 0)) == (255, 0, 0)
    assert none.images == ()


def test_a_folder_with_the_name_of_a_module(tmp_path, monkeypatch):
    save_table(tmp_path / "parquet", "parquet")
    monkeypatch.chdir(tmp_path)
    assert len(load_records("parquet", tmp_path)) == 3


def test_the_digest_depends_on_content_and_order(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(ITEMS))
    first = load_records(tmp_path / "list.json", tmp_path)
    (tmp_path / "again.json").write_text(json.dumps(ITEMS, indent=2))
    assert load_records(tmp_path / "again.json", tmp_path).digest() == first.digest()
    assert weighted(first, 2, 0).digest() != first.digest()
    (tmp_path / "again.json").write_text(json.dumps(ITEMS[::-1]))
    assert load_records(tmp_path / "again.json", tmp_path).digest() != first.digest()
