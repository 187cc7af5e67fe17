"""A user's own questions: from a file of conversations to scores."""

import json
import shutil
from pathlib import Path

import pytest

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.data.files import read_items
from moe_llava.data.records import parse_record
from moe_llava.data.rendering import own_template
from moe_llava.evaluation.ask.answers import begin
from moe_llava.evaluation.ask.generate import prompt_text
from moe_llava.evaluation.ask.tasks import plan_tasks, prepare
from moe_llava.evaluation.score.benchmark import Options, configured, find_benchmark
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress.perturb import Perturbation, perturb_question
from tests.conftest import refused, run_here
from tests.training.conftest import tiny_base  # noqa: F401

LETTERED = "<image>\nwhich colour ?\nA. red\nB. blue"


def record(identity, question, answer, picture=None, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "conversations": turns} | ({"image": picture} if picture else {}) | more


# Fields and metrics of every kind, a conversation, and a question without a picture.
RECORDS = [
    record("a", "<image>\nwhat colour is the 3 ?", "red", "a.png", topic="colour"),
    record("b", "<image>\nhow many digits are there ?", "2", "a.png", topic="count", metric="number"),
    record("c", "<image>\nis there a red 4 ?", "Yes", "b.png", topic="existence", metric="yes_no"),
    record("d", "<image>\nis there a blue 4 ?", "No", "b.png", topic="existence", metric="yes_no"),
    record("e", LETTERED, "B", "b.png", topic="colour", metric="choice"),
    record("f", "what is 1 + 1 ?", "two", topic="count"),
    {
        "id": "g",
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "<image>\n<image>\nhow many digits are there ?"},
            {"from": "gpt", "value": "5"},
            {"from": "human", "value": "what colour are they ?"},
            {"from": "gpt", "value": "red and blue"},
        ],
        "topic": "colour",
        "metric": "word_f1",
    },
]
GIVEN = {"a": "Red.", "b": "There are 3", "c": "yes", "d": "Yes, there is", "e": "The answer is B", "f": "2", "g": "red"}


@pytest.fixture
def write(tiny_base, tmp_path):  # noqa: F811
    """Writes records into a file beside two pictures, and returns it."""

    def written(records=RECORDS, name="held-out.json"):
        for name_there, number in (("a.png", 0), ("b.png", 1)):
            shutil.copyfile(tiny_base / "data" / "images" / "test" / f"{number:06d}.png", tmp_path / name_there)
        file = tmp_path / name
        lines = name.endswith(".jsonl")
        file.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
        return file

    return written


@pytest.fixture
def score(write, tmp_path):
    """Scores `GIVEN`, or other answers, with the command."""

    def scored(*more, records=RECORDS, given=GIVEN):
        file, answers = write(records), tmp_path / "answers.jsonl"
        answers.write_text("".join(json.dumps({"question_id": name, "text": text}) + "\n" for name, text in given.items()))
        done = run_here("score", "questions", "--data", file, "--answers", answers, "--json", *more)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return scored


def test_scores_by_group_with_intervals(score):
    found = score("--group-by", "topic")
    assert (found["data"], found["metric"], found["group_by"], found["questions"]) == ("held-out.json", "exact", "topic", 7)
    assert found["scores"] == {
        "accuracy": pytest.approx(100 * 4.5 / 7),
        "topic/colour": pytest.approx(100 * 2.5 / 3),
        "topic/count": 50,
        "topic/existence": 50,
        "yes_no/accuracy": 50,
        "yes_no/precision": 50,
        "yes_no/recall": 100,
        "yes_no/f1": pytest.approx(200 / 3),
        "yes_no/yes_share": 100,
    }
    assert found["counts"] == {"accuracy": 7, "topic/colour": 3, "topic/count": 2, "topic/existence": 2, "yes_no/accuracy": 2}
    assert found["intervals"].keys() == found["scores"].keys()
    low, high = found["intervals"]["accuracy"]
    assert low < found["scores"]["accuracy"] < high
    assert found["intervals"]["topic/existence"] == [50, 50]  # two questions about one picture are drawn together


def test_the_metric_of_the_file_is_for_records_without_their_own(score):
    assert score()["scores"]["accuracy"] == pytest.approx(100 * 4.5 / 7)
    found = score("--metric", "contains", given=GIVEN | {"a": "it is red", "f": "it is 2"})
    assert (found["metric"], found["scores"]["accuracy"]) == ("contains", pytest.approx(100 * 4.5 / 7))
    assert found["group_by"] is None
    assert not any(name.startswith("topic/") for name in found["scores"])


def test_a_missing_answer_and_one_that_says_neither_are_wrong(score):
    records = [entry for entry in RECORDS if entry["id"] in "cd"]
    found = score(records=records, given={"c": "maybe"})
    assert found["missing"] == ["d"]
    assert (found["scores"]["accuracy"], found["scores"]["yes_no/accuracy"], found["scores"]["yes_no/yes_share"]) == (0, 0, 50)


def test_a_prompt_is_what_the_model_was_trained_on(tiny_base, write):  # noqa: F811
    """Questions with pictures, without, with turns and a system prompt before them: the text of training, up to the answer."""
    file = write()
    _, processor = load_checkpoint(tiny_base / "base")
    _, _, questions = prepare(find_benchmark("questions"), file)
    for question, (source, item) in zip(questions, read_items(file), strict=True):
        messages = parse_record(source, item, file.parent).messages()
        whole = processor.apply_chat_template(messages, own_template(processor))
        prompt = prompt_text(processor, question)
        assert whole.startswith(prompt), question.id
        assert whole.removeprefix(prompt).lstrip().startswith(question.extra["answer"]), question.id
    assert "be brief" in prompt
    assert prompt.count(processor.image_token) == 2


def test_json_lines_and_stored_pictures(write, tmp_path):
    datasets = pytest.importorskip("datasets")
    _, folder, questions = prepare(find_benchmark("questions"), write(name="held-out.jsonl"))
    assert [question.id for question in questions] == list("abcdefg")
    rows = [{**entry, "images": [str(folder.parent / entry["image"])]} for entry in RECORDS[:2]]
    columns = {key: [row[key] for row in rows] for key in ("id", "conversations", "images")}
    table = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "held-out.parquet")
    benchmark, _, questions = prepare(find_benchmark("questions"), tmp_path / "held-out.parquet")
    assert benchmark.title == "held-out.parquet"
    assert questions[0].images[0].open().read() == (tmp_path / "a.png").read_bytes()


def test_words_of_earlier_turns_are_not_perturbed():
    question = Question("1", "what colour are they ?", history=(("how many digits are there ?", "5"),))
    changed = perturb_question(question, Perturbation("typos", 5))
    assert changed.prompt != question.prompt
    assert changed.history == question.history


def test_an_evaluation_that_is_stopped_and_resumed(tiny_base, write, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    common = ["evaluate", tiny_base / "base", "--benchmark", "questions", "--data", write(), "--out", out, "--group-by", "topic"]
    done = run_here(*common, "--limit", "3")
    assert done.exit_code == 0, done.output
    assert "the first 3 of 7 questions" in done.output
    file = out / "questions" / "answers.jsonl"
    before = file.read_text()
    done = run_here(*common, "--perturb", "noise:2,typos:1")
    assert done.exit_code == 0, done.output
    assert "evaluating questions: 4 in" in done.output
    assert file.read_text().startswith(before)
    assert [json.loads(line)["question_id"] for line in file.read_text().splitlines()] == list("abcdefg")
    result = json.loads((out / "questions" / "result.json").read_text())
    assert (result["data"], result["questions"], result["missing"]) == ("held-out.json", 7, [])
    assert {"accuracy", "topic/colour", "topic/count", "topic/existence", "yes_no/f1"} <= result["scores"].keys()
    summary = json.loads((out / "questions" / "robustness.json").read_text())
    assert [(drop["name"], drop["n"]) for drop in summary["drops"]] == [("noise", 7), ("typos", 7)]
    asked = [json.loads(line)["metadata"]["asked"] for line in (out / "questions" / "typos-1" / "answers.jsonl").read_text().splitlines()]
    assert asked[5] != RECORDS[5]["conversations"][0]["value"]

    # Another metric scores the same answers. A table keeps the two apart, and a card has them.
    done = run_here(*common, "--metric", "word_f1")
    assert done.exit_code == 0, done.output
    assert "evaluating" not in done.output
    shutil.copytree(out / "questions", tmp_path / "by-words" / "questions")
    assert run_here(*common).exit_code == 0
    table = run_here("table", out, tmp_path / "by-words").output
    assert "held-out.json by exact, accuracy" in table
    assert "held-out.json by word_f1, accuracy" in table
    shutil.copytree(tiny_base / "base", tmp_path / "model")
    assert run_here("card", tmp_path / "model", "--results", out).exit_code == 0
    assert "| held-out.json by exact | accuracy, % |" in (tmp_path / "model" / "README.md").read_text()

    # A conversation before the prompt is a part of the question.
    changed = json.loads(json.dumps(RECORDS))
    changed[6]["conversations"][2]["value"] = "4"
    write(changed)
    assert "were made with" in refused(*common)


def pictured(name, key="image"):
    return [record("a", f"<{key}>\nwhat colour is the 3 ?", "red", **{key: name}), record("b", "what is 1 + 1 ?", "two")]


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ((pictured("1.png"), "old"), (pictured("1.png"), "new"), "questions: names of pictures"),
        ((pictured("old/1.png"), ""), (pictured("new/1.png"), ""), "questions: names of pictures"),
        ((pictured("old/a.mp4", "video"), ""), (pictured("old/b.mp4", "video"), ""), "questions: names of pictures"),
        ((pictured(["old/1.png"], "video"), ""), (pictured(["new/1.png"], "video"), ""), "questions: names of pictures"),
        ((RECORDS[5:6], ""), ([record("f", "what is 1 + 2 ?", "three")], ""), "questions: texts"),
    ],
)
def test_answers_about_other_pictures_are_refused(tiny_base, tmp_path, monkeypatch, before, now, change):  # noqa: F811
    """The same command resumes, also with a relative path for an absolute one."""
    monkeypatch.chdir(tmp_path)
    for name in ("old/1.png", "new/1.png", "old/a.mp4", "old/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())

    def planned(records, images, home=Path()):
        (tmp_path / "own.json").write_text(json.dumps(records))
        options = Options(images=home / images if images else None)
        return plan_tasks(str(tiny_base / "base"), ["questions"], home / "own.json", tmp_path / "out", None, [], options)[0][0]

    task = planned(*before)
    begin(task.out, task.settings)
    planned(*before, home=tmp_path)
    with pytest.raises(BenchmarkError, match=rf"the answers in .*questions were made with other {change}: choose another --out"):
        planned(*now)
    settings = json.loads((task.out / "settings.json").read_text())
    (task.out / "settings.json").write_text(json.dumps(settings | {"questions": "0123456789abcdef"}))
    with pytest.raises(BenchmarkError, match="made with questions of which no digests were kept, by an earlier version"):
        planned(*before)


def problems(*records):
    return [*RECORDS, *records]


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        (problems(record("h", "why ?", " ")), (), "record 7 of {file} has no answer to its last question, but must have the expected one"),
        (problems({"id": "h", "conversations": [{"from": "human", "value": "why ?"}]}), (), "record 7 of {file} must have 'conversations'"),
        (problems({"conversations": RECORDS[0]["conversations"], "image": "a.png"}), (), "record 7 of {file} has no id, by which"),
        (problems(RECORDS[0] | {"id": None}), (), "record 7 of {file} has no id, by which"),
        (problems(RECORDS[0] | {"id": "h", "topic": ["x"]}), ("--group-by", "topic"), "record 7 of {file} has ['x'] as 'topic', but must"),
        (problems(RECORDS[0]), (), "record 7 of {file} has the id and question 'a, <image>"),
        (RECORDS, ("--metric", "exat"), "--metric is 'exat'; did you mean exact? There are exact, contains"),
        (
            problems(record("h", "why ?", "so", metric="numbr")),
            (),
            "the metric of record 7 of {file} is 'numbr'; did you mean number? There",
        ),
        (problems(record("h", "why ?", "so", metric=5)), (), "the metric of record 7 of {file} is 5"),
        (RECORDS, ("--metric", "number"), "record 0 of {file} has the answer 'red', but the metric number needs a number"),
        (
            problems(record("h", "why ?", "A", metric="choice")),
            (),
            "record 7 of {file} has the answer 'A', but the metric choice needs the l",
        ),
        (RECORDS, ("--group-by", "topics"), "record 0 of {file} has no 'topics' to group it by, only id, topic"),
        (problems(record("h", "why ?", "so")), ("--group-by", "topic"), "record 7 of {file} has no 'topic' to group it by, only id"),
        (
            problems(record("h", "<image>\nwhy ?", "so", "c.png")),
            (),
            "question h of held-out.json names the image {folder}/c.png, which does",
        ),
        (RECORDS, ("--images", "nowhere"), "question a of held-out.json names the image nowhere/a.png, which does not exist"),
        (problems(record("h", "<image>\n<image>\nwhy ?", "so", "a.png")), (), "found 2 image tokens in record 7 of {file} but 1 images"),
        ([], (), "{file} must hold at least one record"),
        (problems(record("h", "?", ""), record("i", "?", "x", metric="y")), (), "expected one\n  the metric of record 8 of"),
    ],
)
def test_what_is_wrong_is_reported_before_the_model_is_loaded(tiny_base, write, tmp_path, records, more, message):  # noqa: F811
    shutil.copytree(tiny_base / "base", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")  # cannot be loaded
    file = write(records)
    found = refused("evaluate", tmp_path / "model", "--benchmark", "questions", "--data", file, "--out", tmp_path / "out", *more)
    assert message.format(file=file, folder=file.parent) in found.replace(" \n", " ")


def test_a_file_that_is_missing_and_a_folder_of_images(write, tmp_path):
    benchmark = find_benchmark("questions")
    with pytest.raises(ValueError, match=r"data file .*gone.json does not exist"):
        prepare(benchmark, tmp_path / "gone.json")
    (tmp_path / "elsewhere").mkdir()
    file = write().rename(tmp_path / "elsewhere" / "held-out.json")
    with pytest.raises(ValueError, match=r"names the image .*elsewhere/a.png, which does not exist"):
        prepare(benchmark, file)
    assert prepare(configured(benchmark, Options(images=tmp_path)), file)


def test_options_are_for_own_questions_only(tiny_base, tmp_path):  # noqa: F811
    common = ["evaluate", tiny_base / "base", "--benchmark", "digits", "--data", tiny_base / "data", "--out", tmp_path / "out"]
    message = "--metric and --group-by may be given for the benchmark questions only, but not for digits"
    assert message in refused(*common, "--metric", "exact", "--group-by", "family")
