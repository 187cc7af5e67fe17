"""Questions made as POPE's are: their number, their objects, the same for the same seed; `score pope` accepts them."""

import json
import random
import re

import pytest

from moe_llava.digits.dataset import write_dataset
from moe_llava.digits.scenes import COLOURS
from moe_llava.evaluation.score.reading import BenchmarkError, read_json_lines
from moe_llava.evaluation.score.scoring import score_answers
from moe_llava.evaluation.stress.pope_questions import read_annotations, write_pope_questions
from tests.conftest import REPOSITORY, run_here

# Pictures that show it: cup 5, fork 5, table 5, dog 4, ball 4, lamp 3, apple 3.
SHOWN = {
    "1.jpg": ["cup", "fork", "table"],
    "2.jpg": ["cup", "fork", "dog", "table"],
    "3.jpg": ["dog", "ball", "apple"],
    "4.jpg": ["dog", "ball"],  # two pairs of questions
    "5.jpg": ["cup", "fork", "table", "lamp", "table"],
    "6.jpg": ["cup", "fork", "table", "lamp", "ball"],  # of seven objects only two are absent: two pairs
    "7.jpg": [],  # left out, as 9.jpg
    "8.jpg": ["apple"],  # one pair
    "9.jpg": ["cup", "fork", "table", "dog", "ball", "lamp", "apple"],
}


def write_lines(file, shown):
    file.write_text("".join(json.dumps({"image": image, "objects": items}) + "\n" for image, items in shown.items()))
    return file


def write_coco(file, shown):
    names = sorted({item for items in shown.values() for item in items})
    content = {
        "images": [{"id": number, "file_name": image} for number, image in enumerate(shown)],
        "categories": [{"id": 10 + number, "name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": 0, "image_id": number, "category_id": 10 + names.index(item)}
            for number, items in enumerate(shown.values())
            for item in items
        ],
    }
    file.write_text(json.dumps(content))
    return file


def labels(folder, category, image):
    """Return the objects in the questions about a picture: (shown, absent)."""
    records = [record for record in read_json_lines(folder / "coco" / f"coco_pope_{category}.json") if record["image"] == image]
    assert [record["label"] for record in records] == ["yes", "no"] * (len(records) // 2)
    objects = [record["text"].removesuffix(" in the image?").split(maxsplit=3)[3] for record in records]
    return objects[::2], objects[1::2]


@pytest.mark.parametrize("write", [write_lines, write_coco])
def test_what_is_asked(tmp_path, write):
    counts = write_pope_questions(write(tmp_path / "annotations", SHOWN), tmp_path / "out")
    assert counts["images"] == 7
    assert counts["questions"] == 34
    assert counts["left_out"] == {"no objects": 1, "all objects of the set": 1, "not drawn": 0}
    for image, pairs in {"1.jpg": 3, "2.jpg": 3, "3.jpg": 3, "4.jpg": 2, "5.jpg": 3, "6.jpg": 2, "8.jpg": 1}.items():
        there = labels(tmp_path / "out", "random", image)[0]
        for category in ("random", "popular", "adversarial"):
            positive, negative = labels(tmp_path / "out", category, image)
            assert positive == there
            assert set(positive) <= set(SHOWN[image])
            assert len(set(positive)) == len(set(negative)) == pairs
            assert not set(negative) & set(SHOWN[image])
    assert labels(tmp_path / "out", "popular", "1.jpg")[1] == ["ball", "dog", "apple"]  # 4, 4 and 3; equals by name
    assert labels(tmp_path / "out", "popular", "3.jpg")[1] == ["cup", "fork", "table"]
    assert labels(tmp_path / "out", "popular", "8.jpg") == (["apple"], ["cup"])


def test_adversarial_follows_each_object(tmp_path):
    shown = {
        "asked.jpg": ["bed", "car", "desk"],
        "a.jpg": ["bed", "pillow"],
        "b.jpg": ["bed", "pillow"],
        "c.jpg": ["bed", "road"],
        "d.jpg": ["car", "road"],
        "e.jpg": ["desk", "lamp"],
        **{f"{number}.jpg": ["sky"] for number in range(5)},
    }
    write_pope_questions(write_lines(tmp_path / "annotations", shown), tmp_path / "out")
    there, negative = labels(tmp_path / "out", "adversarial", "asked.jpg")
    assert dict(zip(there, negative, strict=True)) == {"bed": "pillow", "car": "road", "desk": "lamp"}
    assert labels(tmp_path / "out", "popular", "asked.jpg")[1] == ["sky", "pillow", "road"]


def test_adversarial_goes_on_where_nothing_ever_came_with_it(tmp_path):
    shown = {
        "asked.jpg": ["cat", "dog", "fish"],
        "a.jpg": ["cat", "dog", "fish", "bowl"],
        "b.jpg": ["sky"],
        "c.jpg": ["sky"],
        "d.jpg": ["sun"],
    }
    write_pope_questions(write_lines(tmp_path / "annotations", shown), tmp_path / "out")
    assert labels(tmp_path / "out", "adversarial", "asked.jpg")[1] == ["bowl", "sky", "sun"]


def test_the_same_for_the_same_seed(tmp_path):
    shown = {f"{number}.jpg": random.Random(number).sample("abcdefghijkl", 5) for number in range(30)}
    file = write_lines(tmp_path / "annotations", shown)
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        counts = write_pope_questions(file, tmp_path / name, images=10, seed=seed)
        assert (counts["images"], counts["left_out"]["not drawn"]) == (10, 20)
        texts.append((tmp_path / name / "llava_pope_test.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_pope_scores_them(tmp_path):
    """The command writes them, also for pictures in folders."""
    file = write_coco(tmp_path / "annotations", {f"test/{image}": items for image, items in SHOWN.items()})
    done = run_here("pope-questions", file, tmp_path / "pope")
    assert done.exit_code == 0, done.output
    assert "34 questions of each kind, about 7 pictures" in done.stdout
    assert "1 pictures left out: no objects\n1 pictures left out: all objects of the set\n" in done.stdout
    questions = read_json_lines(tmp_path / "pope" / "llava_pope_test.jsonl")
    assert [question["question_id"] for question in questions] == list(range(1, 103))
    assert questions[0]["text"].endswith(" in the image?\nAnswer the question using a single word or phrase.")
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"question_id": question["question_id"], "text": "Yes"}) + "\n" for question in questions))
    scores = score_answers("pope", tmp_path, answers)["scores"]
    assert scores["random/accuracy"] == scores["adversarial/precision"] == 0.5
    assert scores["popular/recall"] == 1


def test_articles(tmp_path):
    shown = {"1.jpg": ["apple", "orange", "red 7"], "2.jpg": ["umbrella", "8", "cat"]}
    write_pope_questions(write_lines(tmp_path / "annotations", shown), tmp_path / "out")
    texts = {record["text"] for record in read_json_lines(tmp_path / "out" / "coco" / "coco_pope_random.json")}
    assert {"Is there an apple in the image?", "Is there a red 7 in the image?", "Is there an umbrella in the image?"} <= texts


def test_the_digits_world(tmp_path, monkeypatch):
    """The pictures of the digits world, annotated as in the documentation."""
    (tmp_path / "runs" / "demo" / "data").mkdir(parents=True)
    write_dataset(tmp_path / "runs" / "demo" / "data", train_images=1, test_images=30)
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall("```python\n(.*?)```", (REPOSITORY / "docs" / "robustness.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(script, {})
    shown = read_annotations(tmp_path / "runs" / "demo" / "objects.jsonl")
    assert len(shown) == 30
    colours = "|".join(COLOURS)
    assert all(re.fullmatch(rf"({colours}) \d", item) for items in shown.values() for item in items)
    counts = write_pope_questions(tmp_path / "runs" / "demo" / "objects.jsonl", tmp_path / "out")
    assert counts["images"] == sum(len(items) > 0 for items in shown.values()) > 0
    assert counts["questions"] == sum(2 * min(3, len(items)) for items in shown.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no pictures"),
        ('{"image": "1.jpg"}', "record 1 of .* has no 'objects'"),
        ('{"image": "1.jpg", "objects": ["a"]}\n{"image": "1.jpg", "objects": []}', "record 2 .* once more"),
        ('{"image": "1.jpg", "objects": ["a", null]}', "the object None"),
        ('{"image": "1.jpg", "objects": "cat"}', "a list of 'objects'"),
        ('{"image": 5, "objects": []}', "record 1 of .* must have a string as 'image', but has 5"),
        ('{"image": "", "objects": []}', "record 1 of .* must have a file name as 'image'"),
        ('{"image": "a", "image": "b", "objects": []}', "has the key 'image' twice"),
        (b'{"image": "a", "objects": []}\n{"image": "\xe9"}', "line 2 of .* is not UTF-8 text: it has the byte 0xe9"),
        ('{"image": "a/1.jpg", "objects": []}\n{"image": "b/1.jpg", "objects": []}', "a/1.jpg and b/1.jpg"),
        ('{"annotations": [], "images": null, "categories": []}', "a list of 'images'"),
        ('{"annotations": [], "images": [5], "categories": []}', "image 0 of .* must be an object, but is 5"),
        (
            '{"annotations": [{"image_id": 1, "category_id": 2}], "images": [{"id": 1, "file_name": "a"}], "categories": []}',
            "category_id 2",
        ),
        ('{"annotations": [], "images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}], "categories": []}', "'a' once more"),
        (
            '{"annotations": [], "images": [{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}], "categories": []}',
            "image 1 of .* has the id '7' once more, after image 0 of",
        ),
        (
            '{"annotations": [], "images": [], "categories": [{"id": 1, "name": "cup"}, {"id": 1, "name": "dog"}]}',
            "category 1 of .* has the id '1' once more, after category 0 of",
        ),
        ('{"annotations": [], "images": [{"id": [1], "file_name": "a"}], "categories": []}', r"must have a number or a string as 'id'"),
        ('{"annotations": [], "images": [{"id": 1, "file_name": 2}], "categories": []}', "image 0 of .* must have a string as 'file_name'"),
    ],
)
def test_bad_annotations(tmp_path, content, message):
    file = tmp_path / "annotations"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BenchmarkError, match=message):
        read_annotations(file)


def test_too_few_pictures(tmp_path):
    file = write_lines(tmp_path / "annotations", SHOWN)
    with pytest.raises(BenchmarkError, match=r"has 7 usable pictures, but must have at least 8.* 1 of 9 pictures show none, 1 show all"):
        write_pope_questions(file, tmp_path / "out", images=8)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BenchmarkError, match=r"has 0 usable pictures, but must have at least 1.*2 of 3 pictures show none, 1 show all"):
        write_pope_questions(write_lines(tmp_path / "annotations", {"1.jpg": [], "2.jpg": [], "3.jpg": ["cup"]}), tmp_path / "out")


def test_pictures_of_a_single_object(tmp_path):
    """Each picture has as many questions with yes as with no."""
    shown = {f"{number}.jpg": [("cup", "dog", "fork")[number % 3]] for number in range(6)}
    counts = write_pope_questions(write_lines(tmp_path / "annotations", shown), tmp_path / "out")
    assert (counts["images"], counts["questions"]) == (6, 12)
    for category in ("random", "popular", "adversarial"):
        for image, items in shown.items():
            positive, negative = labels(tmp_path / "out", category, image)
            assert (positive, len(negative)) == (items, 1)
