"""Shards hold the records of a data file, and a stream of them goes on where it was, whatever its lanes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.data.check import check_data
from moe_llava.data.shards import ShardError, list_shards, parse_shard_record, read_shard
from moe_llava.data.stream import Stream
from tests.conftest import refused, run_here
from tests.data.shards import to_samples, write_parquet, write_tar


def talk(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def records(tmp_path):
    """Ten records, the first of them without an image."""
    for shade in range(10):
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    images = [{"conversations": talk(f"<image>\n{shade} ?"), "image": f"{shade}.png"} for shade in range(1, 10)]
    return [{"conversations": talk("0 ?")}, *images]


@pytest.fixture(params=["memory://{}/", "file://{}/", "{}/"])
def place(request, tmp_path):
    return request.param.format(tmp_path)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("start", [0, 4, 9, 10])
def test_a_shard_holds_records_and_images(records, tmp_path, place, kind, start):
    """From any record on, in row groups of three."""
    shard = f"{place}part-0.{kind}"
    if kind == "tar":
        write_tar(shard, to_samples(records, tmp_path))
    else:
        write_parquet(shard, records, tmp_path)
    (found,) = list_shards(f"{place}part-*.{kind}")
    items = list(read_shard(found, start))
    assert [number for number, *_ in items] == list(range(start, 10))
    for number, source, item in items:
        record = parse_shard_record(source, item)
        assert record.turns == ((f"<image>\n{number} ?" if number else "0 ?", "yes"),)
        assert [open_image(image, source).getpixel((0, 0)) for image in record.images] == ([(number, 0, 0)] if number else [])
        assert str(found) in source


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("form", ["bytes", "Image", "name"])
def test_images_in_the_columns_of_a_row(records, tmp_path, key, form):
    """One, or a list; a name alone is no image."""
    data, name = (tmp_path / "3.png").read_bytes(), "3.png"
    value = {"bytes": data, "Image": {"bytes": data, "path": name}, "name": {"bytes": None, "path": name}}[form]
    row = {"messages": [{"role": "user", "content": "<image>3 ?"}, {"role": "assistant", "content": "yes"}], "id": None}
    table = pa.Table.from_pylist([row | {key: [value] if key == "images" else value}])
    pq.write_table(table, tmp_path / "x.parquet")
    ((_, source, item),) = read_shard(str(tmp_path / "x.parquet"))
    if form == "name":
        with pytest.raises(DataError, match=r"row 0 of .*x.parquet names the file 3.png, which is not in its shard"):
            parse_shard_record(source, item)
        return
    (image,) = parse_shard_record(source, item).images
    assert open_image(image, source).getpixel((0, 0)) == (3, 0, 0)
    assert str(image) == f"0 of row 0 of {tmp_path / 'x.parquet'}"


def test_a_sample_without_names_has_all_its_images(tmp_path):
    png = {}
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "x.png")
        png[colour] = (tmp_path / "x.png").read_bytes()
    item = {"conversations": talk("<image><image>\nSame ?", "no")}
    write_tar(str(tmp_path / "x.tar"), [{"a/7.0.png": png["red"], "a/7.json": json.dumps(item).encode(), "a/7.1.png": png["blue"]}])
    ((_, source, item),) = read_shard(str(tmp_path / "x.tar"))
    assert source == f"sample a/7 of {tmp_path / 'x.tar'}"
    colours = [open_image(image, source).getpixel((0, 0)) for image in parse_shard_record(source, item).images]
    assert colours == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"7.json": b'{"conversations": ['}, "sample 7 of .*x.tar is not JSON"),
        ({"7.json": b'{"id": 1, "id": 2}'}, "sample 7 of .*x.tar has the key 'id' twice"),
        ({"7.png": b"", "7.txt": b"a 7"}, "sample 7 of .*x.tar must have one .json, but has 7.png, 7.txt"),
        (
            {"7.json": json.dumps({"conversations": talk("<image> ?"), "image": "8.png"}).encode(), "7.png": b""},
            "names the file 8.png, which",
        ),
        (
            {"7.json": json.dumps({"conversations": talk("<video> ?"), "video": "7.mp4"}).encode(), "7.mp4": b""},
            "names the file 7.mp4, which",
        ),
        ({"7.json": json.dumps({"conversations": talk("7 ?")}).encode(), "7.png": b""}, "found 0 image tokens in sample 7 of"),
    ],
)
def test_a_bad_sample_is_named_and_the_next_one_read(tmp_path, files, problem):
    write_tar(str(tmp_path / "x.tar"), [files, {"8.json": json.dumps({"conversations": talk("8 ?")}).encode()}])
    bad, good = read_shard(str(tmp_path / "x.tar"))
    with pytest.raises(DataError, match=problem):
        parse_shard_record(*bad[1:])
    assert parse_shard_record(*good[1:]).turns == (("8 ?", "yes"),)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_damaged_shard_is_no_bad_record(records, tmp_path, kind):
    whole = tmp_path / f"whole.{kind}"
    if kind == "tar":
        write_tar(str(whole), to_samples(records, tmp_path))
    else:
        write_parquet(str(whole), records, tmp_path)
    data = whole.read_bytes()
    (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2 + 7])
    with pytest.raises(ShardError, match=f"shard .*cut.{kind} cannot be read (after record|from its beginning)"):
        list(read_shard(str(tmp_path / f"cut.{kind}")))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/*.tar", "shards .*.tar do not exist"),
        ("memory://{}/x.json", "x.json is no shard: its name must end in .parquet or .tar"),
        ("s4://bucket/*.tar", "shards s4://bucket/.*.tar cannot be listed: Protocol not known"),
    ],
)
def test_names_of_no_shards(tmp_path, pattern, message):
    import fsspec

    fsspec.filesystem("memory").pipe(f"{tmp_path}/x.json", b"[]")
    with pytest.raises(DataError, match=message):
        list_shards(pattern.format(tmp_path))


@pytest.fixture
def five(tmp_path):
    """A pattern of five shards with four records each, which are numbered."""
    for shard in range(5):
        records = [{"conversations": talk(f"{shard * 4 + number} ?")} for number in range(4)]
        write_tar(str(tmp_path / f"{shard}.tar"), to_samples(records, tmp_path))
    return str(tmp_path / "*.tar")


def taken(stream, indices):
    return [int(stream[index].turns[0][0].removesuffix(" ?")) for index in indices]


@pytest.mark.parametrize(("processes", "workers", "buffer"), [(1, 0, 1), (1, 0, 7), (1, 3, 3), (2, 1, 100), (2, 2, 4)])
def test_a_stream_goes_on_from_every_step(five, tmp_path, processes, workers, buffer):
    """Over more than two passes, with three records in a batch. Every process and worker reads as a process of its own does."""

    def begin():
        return Stream(five, 60, 3, processes, workers, buffer, seed=3, stage=2)

    whole = begin()
    expected = taken(whole, range(60))
    lanes = [[number for index, number in enumerate(expected) if whole.lane_of(index) == lane] for lane in range(whole.lanes)]
    assert taken(begin(), range(60)) == expected
    assert set().union(*lanes) == set(range(20))
    assert sum(len(set(lane)) for lane in lanes) == 20  # no record is in two lanes
    for lane in lanes:
        records = len(set(lane))
        passes = [lane[start : start + records] for start in range(0, len(lane), records)]
        assert all(len(set(each)) == len(each) for each in passes)  # also if a block would hold more
        shards = [lane[start : start + 4] for start in range(0, len(lane), 4)]
        assert all(shard == sorted(shard) for shard in shards) == (buffer == 1)
    for step in range(processes * 3, 60, processes * 3):
        first = begin()
        taken(first, range(step))
        save = tmp_path / f"save-{step}"
        save.mkdir()
        for process in range(processes):
            first.save(save, process, first.positions)
        resumed = begin()
        resumed.positions = resumed.read_positions(save)
        assert taken(resumed, range(step, 60)) == expected[step:]


def test_a_stream_wants_the_lanes_of_its_save(five, tmp_path):
    stream = Stream(five, 60, 3, 1, 2, 4, seed=3, stage=2)
    taken(stream, range(6))
    stream.save(tmp_path, 0, stream.positions)
    with pytest.raises(DataError, match="is of 1 processes with 2 workers and 3 records at once, but this run has 1 processes with 3"):
        Stream(five, 60, 3, 1, 3, 4, seed=3, stage=2).read_positions(tmp_path)
    with pytest.raises(DataError, match="tar: 5, but 3 processes with 2 workers each need at least 6, one for each worker"):
        Stream(five, 60, 3, 3, 2, 4, seed=3, stage=2)


def test_stage_I_wants_images(five):
    with pytest.raises(DataError, match=r"of .*.tar has no image, but stage I trains the projector"):
        Stream(five, 60, 3, 1, 0, 4, seed=3, stage=1)[0]


def test_an_empty_shard_is_passed_over_unless_all_are(five, tmp_path):
    write_tar(str(tmp_path / "4.tar"), [])
    assert set(taken(Stream(five, 60, 3, 1, 0, 4, seed=3, stage=2), range(60))) == set(range(16))
    with pytest.raises(ShardError, match=r"4.tar and the 0 other shards of its process hold no record"):
        Stream(str(tmp_path / "4.tar"), 60, 3, 1, 0, 4, seed=3, stage=2)[0]


def test_a_sample_of_shards_is_checked(five, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_llava.data.shards.SAMPLED_RECORDS", 3)
    monkeypatch.setattr("moe_llava.data.shards.SAMPLED_SHARDS", 2)
    write_tar(str(tmp_path / "2.tar"), [{"7.json": b"{"}])
    report = check_data(five, Path())
    assert report.sample == "a sample: at most 3 records from the beginning of 2 of 5 shards"  # 0.tar and 2.tar
    assert (report.records, report.text_only, len(report.problems)) == (4, 3, 1)
    done = run_here("check", five)
    assert done.exit_code == 1
    assert done.stdout.startswith("a sample: at most 3 records")
    assert "--images is here, but" in refused("check", five, "--images", "here")
