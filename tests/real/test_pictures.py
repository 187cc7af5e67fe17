"""The data set of pictures: subjects are trained on or tested, yes and no are balanced, and no answer is given away."""

import json
from collections import Counter

import pytest
from PIL import Image

from moe_llava.data.store import load_records
from moe_llava.evaluation.score.benchmark import find_benchmark
from real.pictures import find_pictures, write_dataset

NAMES = {
    "animals/birds": ["A duck.", "A grey goose!", "An owl.", "A hen.", "A crow.", "A wild goose.", "A finch.", "A robin.", "A swan."],
    "food/fruit": ["A Fuji apple.", "A “Gala” apple.", "A red pear.", "A bunch of grapes.", "A lime.", "A fig.", "A plum.", "A kiwi."],
    "symbols/letters": ["A big B."],
    "town": ["Enter the cave.", "An inn. Rest here.", "A very old and quite large stone bridge over the river."],
}


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stamps")
    for kind, captions in NAMES.items():
        (folder / kind).mkdir(parents=True)
        for number, caption in enumerate(captions):
            (folder / kind / f"{number}.txt").write_text(f"{caption}\nde.utf8=Noch etwas.\n", encoding="utf-8")
            Image.new("RGBA", (30 + number, 40), (200, 10 * number, 0, 128)).save(folder / kind / f"{number}.png")
    (folder / "animals" / "birds" / "drawing.txt").write_text("A stork.\n")  # its picture is no PNG
    return folder


def test_names_are_read_from_captions(stamps):
    found = {picture.phrase: picture for picture in find_pictures(stamps)}
    assert len(found) == 18
    assert {"an owl", "a Gala apple", "a bunch of grapes", "an inn"} <= found.keys()
    assert (found["a Fuji apple"].subject, found["a bunch of grapes"].subject, found["a grey goose"].subject) == ("apple", "bunch", "goose")
    assert (found["an owl"].category, found["an inn"].category) == ("animal", None)


def test_the_data_set_is_sound(stamps, tmp_path):
    counts = write_dataset(stamps, tmp_path)
    read = {
        name: load_records(tmp_path / f"{name}.json", tmp_path / "images")
        for name in ("captions", "names", "kinds", "existence", "test", "test-without-images")
    }
    assert counts["test"] == len(read["test"]) == len(read["test-without-images"])
    assert counts["trained"] + counts["tested"] == 18
    assert counts["tested"] > 0
    of = {picture.phrase: picture.subject for picture in find_pictures(stamps)}
    trained = {of[record.turns[0][1][0].lower() + record.turns[0][1][1:-1]] for record in read["captions"]}
    records = json.loads((tmp_path / "test.json").read_text())
    tested = {record["conversations"][1]["value"].split()[-1].lower() for record in records if record["family"] == "name"}
    assert not trained & tested
    for kind in ("random", "popular", "adversarial"):
        replies = Counter(record["conversations"][1]["value"] for record in records if record["family"] == kind)
        assert replies["yes"] == replies["no"] == counts["tested"]
    replies = Counter(record.turns[0][1] for record in read["existence"])
    assert 0.8 < replies["yes"] / replies["no"] < 1.25  # drawn at random
    assert {len(record.turns) for name in ("names", "kinds", "existence") for record in read[name]} == {1}
    of_kinds = Counter(record.turns[0][1] for record in read["kinds"])
    assert abs(of_kinds["animal"] - of_kinds["food"]) < 50  # as many of each, though the pictures are not
    assert {record["family"]: record["metric"] for record in records}["kind"] == "yes_no"
    assert all(not record.images for record in read["test-without-images"])
    assert len(find_benchmark("questions").questions(tmp_path / "test-without-images.json")) == len(records)
    sizes = {Image.open(file).size for file in (tmp_path / "images").iterdir()}
    assert sizes == {(224, 224)}
