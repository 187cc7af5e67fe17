"""Invalid data is reported with file, record, value and rule, before any work."""

import json

import pytest
from PIL import Image

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.data.records import content_parts
from moe_llava.data.store import load_records, weighted


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def write(*records, name="data.json"):
        (tmp_path / name).write_text(records[0] if isinstance(records[0], str) else json.dumps(list(records)))
        return tmp_path / name, tmp_path

    return write


def conversation(*values, **keys):
    return {"conversations": [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)], **keys}


def test_records_with_and_without_images(write):
    records = load_records(
        *write(
            conversation("<image>\nWhat?", "This.", "And?", "That.", image="a.png", id="x", family="colour"),
            conversation("Hello", "Hi"),
            conversation("<image> and <image>", "two", image=["a.png", "a.png"]),
        )
    )
    assert records[0].turns == (("<image>\nWhat?", "This."), ("And?", "That."))
    assert records[0].extra == {"id": "x", "family": "colour"}
    assert records[0].messages() == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]
    assert records[1].images == ()
    assert len(records[2].images) == 2


def test_placeholders_keep_their_places():
    kinds = [part["type"] for part in content_parts("What is <image> beside <image>?")]
    assert kinds == ["text", "image", "text", "image", "text"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (conversation("<image><image><image> x", "y", image=["a.png", "a.png"]), "found 3 image tokens in record 0 of .* but 2 images"),
        (conversation("x", "y", image="a.png"), "found 0 image tokens in record 0 of .* but 1 images"),
        (conversation("<image>", "y", image=""), "found 1 image tokens in record 0 of .* but 0 images"),
        (conversation("<image> x", "y", image="b.png"), r"record 0 of .*data.json names the image .*b.png, which does not exist"),
        (conversation("x"), "record 0 of .* must have 'conversations', a list of human and gpt turns in pairs"),
        (conversation("x", "y", image=5), "record 0 of .* must have a file name or a list of them as 'image', but has 5"),
        ({"id": 3}, "record 0 of .* must have 'conversations'"),
        (5, "record 0 of .* must have 'conversations'"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "gpt", "value": "y"}]}, "turn 0 of record 0 .* from 'human'"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt"}]}, "turn 1 of record 0 .* from 'gpt'"),
        (conversation("<image> x", "see <image>", image="a.png"), "turn 1 of record 0 of .* is an answer with <image>"),
    ],
)
def test_bad_records(write, record, message):
    with pytest.raises(DataError, match=message):
        load_records(*write(record))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ("{}", "line 1 of .* must have 'conversations' or 'messages'"),
        ("[]", "at least one record"),
        ("", "is empty"),
        ("{}\n{", "is neither a JSON list nor JSON lines: line 2"),
    ],
)
def test_bad_files(write, text, message):
    with pytest.raises(DataError, match=message):
        load_records(*write(text))


def test_lines_and_messages(write):
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}]
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
    ]
    lines = [
        conversation("<image>\nWhat?", "This.", image="a.png"),
        {"messages": messages, "images": ["a.png"]},
        {"messages": parts, "image": "a.png"},
    ]
    records = load_records(*write("\n\n".join(map(json.dumps, lines)) + "\n", name="data.jsonl"))
    assert [record.source.split(" of ")[0] for record in records] == ["line 1", "line 3", "line 5"]
    assert {(record.turns, record.images) for record in records} == {((("<image>\nWhat?", "This."),), records[0].images)}
    wrong = {"messages": [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(DataError, match=r"turn 0 of record 0 of .* must be a text from 'user'"):
        load_records(*write(wrong))


def test_all_problems_are_reported_at_once(write):
    good, bad = conversation("x", "y"), conversation("<image>", "y", image="")
    with pytest.raises(DataError) as caught:
        load_records(*write(good, bad, good, bad))
    assert [line.split(" but ")[0].split(" of ")[0].strip() for line in str(caught.value).splitlines()] == [
        "found 1 image tokens in record 1",
        "found 1 image tokens in record 3",
    ]
    with pytest.raises(DataError, match=r"and 5 more: `moe-llava check .*data.json --images DIR` shows all"):
        load_records(*write(*[bad] * 25))


def test_weights(write):
    records = load_records(*write(*[conversation(str(number), "y") for number in range(10)]))

    def drawn(weight, seed=0):
        return [int(record.turns[0][0]) for record in weighted(records, weight, seed)]

    assert drawn(1) == list(range(10))
    assert drawn(2) == list(range(10)) * 2
    half = drawn(0.5)
    assert len(half) == len(set(half)) == 5
    assert half == sorted(half)
    assert half == drawn(0.5) != drawn(0.5, seed=1)
    assert len(drawn(1.3)) == 13


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        load_records(tmp_path / "nowhere.json", tmp_path)


@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_an_image_that_does_not_decode(write, tmp_path, damage):
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(b"no image" if damage == "text" else whole[: len(whole) // 2])
    records = load_records(*write(conversation("<image> x", "y", image="a.png")))
    with pytest.raises(DataError, match=r"record 0 of .* names the image .*a.png, which cannot be decoded"):
        open_image(records[0].images[0], records[0].source)


def test_an_image_too_large_to_decode(write, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match="cannot be decoded: Image size"):
        open_image(tmp_path / "a.png", "record 0")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the conversation names the image .*gone.png, which does not exist"):
        open_image(tmp_path / "gone.png", "the conversation")


def test_system_prompts(write):
    """A system prompt is the first turn, or a key."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    first, key, none = load_records(
        *write(
            {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
            conversation("x", "y", system="Be brief."),
            {"messages": turns},
        )
    )
    assert (first.system, key.system, none.system) == ("Be brief.", "Be brief.", "")
    assert first.turns == key.turns == none.turns
    assert first.messages()[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert "system" not in key.extra
    with pytest.raises(DataError, match=r"record 0 of .* must have a text without <image> as its system prompt, but has 5"):
        load_records(*write(conversation("x", "y", system=5)))


@pytest.mark.parametrize(
    "text", ["<video>\nwhat ?", "what happens in <video> ?", "<image><video>\nwhat ?", "<VIDEO>\nwhat ?", "what do you hear ? <audio>"]
)
def test_a_placeholder_of_another_medium_is_named(write, text):
    rule = r"(<(video|VIDEO)>, but its record has no 'video'|<audio>, but models here read no audio)"
    with pytest.raises(DataError, match=r"turn 0 of record 0 of .* has " + rule):
        load_records(*write(conversation(text, "x", **({"image": "a.png"} if "<image>" in text else {}))))


@pytest.mark.parametrize("text", ["how does `<video>` work ?", "<body>\n<video>\n<source>\n</video>\n</body> is it right ?"])
def test_html_is_text(write, text):
    assert load_records(*write(conversation(text, "x")))[0].turns == ((text, "x"),)


@pytest.mark.parametrize(("name", "lines"), [("data.json", "[%s]"), ("data.jsonl", "%s\n")])
def test_a_duplicate_key_is_named(write, name, lines):
    record = json.dumps(conversation("<image>\nwhat ?", "x", image="a.png"))[:-1] + ', "image": "b.png"}'
    with pytest.raises(DataError, match=r"(record 0|line 1) of .* has the key 'image' twice"):
        load_records(*write(lines % record, name=name))
