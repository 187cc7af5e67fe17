"""The files of every benchmark: unique ids, complete ground truth, text in UTF-8. What is wrong is reported, by file and record, before a
question is asked."""

import base64
import json
import shutil
from functools import partial

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from moe_llava.evaluation.ask.tasks import prepare
from moe_llava.evaluation.score.benchmark import check_truth, find_benchmark, result, split_in
from moe_llava.evaluation.score.choices import LETTERS
from moe_llava.evaluation.score.definitions.mmmu import DISCIPLINE
from moe_llava.evaluation.score.questions import pair
from moe_llava.evaluation.score.reading import BenchmarkError, read_json_lines
from moe_llava.evaluation.score.scoring import judge_answers, score_answers
from tests.conftest import refused
from tests.training.conftest import tiny_base  # noqa: F401

OPTIONS = "".join(f"\n{letter}. {letter}" for letter in LETTERS[:4])


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def llava(ids=(1, 2), image="{}.jpg", text="q{}?", **more):
    return lines({"question_id": n, "image": image.format(n), "text": text.format(n), **more} for n in ids)


def mmbench():
    columns = ["index", "question", "A", "B", "answer", "image"]
    rows = [[str(n), f"q{n}?", "yes", "no", "A", base64.b64encode(b"image").decode()] for n in (1, 2)]
    return "\n".join("\t".join(row) for row in [columns, *rows]) + "\n"


def annotation(n):
    return {"question_id": n, "question_type": "what", "answer_type": "other", "answers": [{"answer": "red"}] * 10}


def gqa(n):
    return {"question": f"q{n}?", "answer": "red", "types": {"structural": "query", "semantic": "attr"}, "isBalanced": True}


# Benchmark -> its files, by hand. Those of MME, TextVQA, POPE and ScienceQA are recorded.
WRITTEN = {
    "vqav2": {
        "llava_vqav2_mscoco_val2014.jsonl": llava(),
        "v2_mscoco_val2014_annotations.json": json.dumps({"annotations": [annotation(1), annotation(2)]}),
    },
    "gqa": {
        "llava_gqa_testdev_balanced.jsonl": llava(),
        "testdev_balanced_questions.json": json.dumps({str(n): gqa(n) for n in (1, 2)}, indent=1),
    },
    "vizwiz": {
        "val.json": json.dumps(
            [{"image": f"{n}.jpg", "question": "?", "answers": ["a"] * 10, "answer_type": "other", "answerable": 1} for n in (1, 2)]
        )
    },
    "mmbench": {"mmbench_dev_20230712.tsv": mmbench()},
    "mmbench-cn": {"mmbench_dev_cn_20231003.tsv": mmbench()},
    "seed-bench": {
        "llava-seed-bench.jsonl": llava(image="SEED-Bench-image/{}", text="q{}?" + OPTIONS, category="x"),
        "SEED-Bench.json": json.dumps({"questions": [{"question_id": str(n), "answer": "B", "question_type_id": 1} for n in (1, 2)]}),
    },
    "llava-bench": {
        "questions.jsonl": llava(category="conv"),
        "context.jsonl": lines({"image": f"{n}.jpg", "caption": "a cat"} for n in (1, 2)),
        "answers_gpt4.jsonl": lines({"question_id": n, "text": "a cat"} for n in (1, 2)),
    },
    "mm-vet": {
        "llava-mm-vet.jsonl": llava(),
        "mm-vet.json": json.dumps({f"v1_{n}": {"answer": "red", "capability": ["rec"]} for n in (1, 2)}),
    },
    "digits": {
        "test.json": json.dumps(
            [
                {"id": str(n), "image": f"{n}.png", "family": "count", "kind": "", "conversations": turns}
                for n in (1, 2)
                for turns in [[{"from": "human", "value": f"<image>\nq{n}?"}, {"from": "gpt", "value": "2"}]]
            ]
        )
    },
}
RECORDED = {"mme": "MME", "textvqa": "textvqa", "pope": "pope", "scienceqa": "scienceqa"}


@pytest.fixture
def make(tmp_path, request):
    """Write the folder of a benchmark."""

    def write(name):
        folder = tmp_path / name
        if name in RECORDED:
            shutil.copytree(request.getfixturevalue("golden") / "eval" / RECORDED[name], folder, copy_function=shutil.copyfile)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o755)
        elif name == "mmmu":
            image = {"bytes": b"one", "path": None}
            for subject in DISCIPLINE:
                row = {"id": subject, "question": "<image 1>?", "options": "['a', 'b']", "answer": "A", "question_type": "multiple-choice"}
                (folder / subject).mkdir(parents=True)
                pa.parquet.write_table(pa.Table.from_pylist([row | {"image_1": image}]), folder / subject / "validation-0.parquet")
        else:
            folder.mkdir()
            for file, content in WRITTEN[name].items():
                (folder / file).write_text(content)
        return folder

    return write


def look(name, folder):
    """Check what is checked before the evaluation, except pictures."""
    benchmark = split_in(find_benchmark(name), folder)
    questions = benchmark.questions(folder)
    check_truth(benchmark, folder, questions)
    return benchmark, questions


@pytest.mark.parametrize("name", [*WRITTEN, *RECORDED, "mmmu"])
def test_good_files(make, name):
    assert look(name, make(name))[1]


def repeat_line(text, number=0):
    return text + text.splitlines(keepends=True)[number]


def repeat_in(key, text):
    content = json.loads(text)
    records = content if key is None else content[key]
    records.append(records[0])
    return json.dumps(content)


def repeat_key(text):
    """Return the text of an object with its first key twice."""
    key, value = next(iter(json.loads(text).items()))
    return "{" + f"{json.dumps(key)}: {json.dumps(value)}, " + text.lstrip()[1:]


def other_label(text):
    """Repeat the first question under another id and with the other label."""
    record = json.loads(text.splitlines()[0])
    return text + json.dumps(record | {"question_id": 999, "label": {"yes": "no", "no": "yes"}[record["label"]]}) + "\n"


@pytest.mark.parametrize(
    ("name", "file", "repeat", "message"),
    [
        ("vqav2", "llava_vqav2_mscoco_val2014.jsonl", repeat_line, "record 3 of .* has the question_id '1' once more, after record 1"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", partial(repeat_in, "annotations"), "annotation 3 of .* the question_id '1' once"),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", repeat_line, "record 3 of .* has the question_id '1' once more"),
        ("gqa", "testdev_balanced_questions.json", repeat_key, "testdev_balanced_questions.json has the key '1' twice"),
        ("vizwiz", "val.json", partial(repeat_in, None), "record 3 of .* has the image '1.jpg' once more"),
        ("mmbench", "mmbench_dev_20230712.tsv", lambda text: repeat_line(text, 1), "row 3 of .* has the index 1 once more, after row 1"),
        ("mmbench", "mmbench_dev_20230712.tsv", lambda text: text.replace("\tB\t", "\tA\t", 1), "has the column 'A' twice"),
        ("mmbench-cn", "mmbench_dev_cn_20231003.tsv", lambda text: repeat_line(text, 1), "row 3 of .* has the index 1 once more"),
        ("seed-bench", "llava-seed-bench.jsonl", repeat_line, "record 3 of .* has the question_id '1' once more"),
        ("seed-bench", "SEED-Bench.json", partial(repeat_in, "questions"), "question record 3 of .* has the question_id '1' once more"),
        ("llava-bench", "questions.jsonl", repeat_line, "record 3 of .* has the question_id '1' once more"),
        ("llava-bench", "context.jsonl", repeat_line, "record 3 of .* has the image '1.jpg' once more"),
        ("llava-bench", "answers_gpt4.jsonl", repeat_line, "record 3 of .* has the question_id '1' once more"),
        ("mm-vet", "llava-mm-vet.jsonl", repeat_line, "record 3 of .* has the question_id '1' once more"),
        ("mm-vet", "mm-vet.json", repeat_key, "mm-vet.json has the key 'v1_1' twice"),
        ("digits", "test.json", partial(repeat_in, None), "record 2 of .* has the id and question '1, .*' once more"),
        ("mme", "llava_mme.jsonl", repeat_line, "record 77 of .* has the question_id and text 'existence/0000.png, .*' once more, after"),
        ("mme", "MME_Benchmark_release_version/color/0000.txt", repeat_line, "line 3 of .*color/0000.txt has the question .* once more"),
        (
            "textvqa",
            "llava_textvqa_val_v051_ocr.jsonl",
            lambda text: repeat_line(text, 5),
            "more often than TextVQA_0.5.1_val.json: 2 times",
        ),
        ("textvqa", "TextVQA_0.5.1_val.json", partial(repeat_in, "data"), "data record 50 of .* has the question_id '34602' once more"),
        ("pope", "llava_pope_test.jsonl", repeat_line, "record 61 of .* has the question_id '1' once more"),
        ("pope", "coco/coco_pope_random.json", repeat_line, "line 21 of .*random.json has the question_id '1' once more"),
        ("pope", "coco/coco_pope_popular.json", other_label, "line 21 of .*popular.json has the label .*, which had the other label"),
        ("scienceqa", "llava_test_CQM-A.json", partial(repeat_in, None), r"record \d+ of .*CQM-A.json has the id '1000' once more"),
        ("scienceqa", "problems.json", repeat_key, "problems.json has the key '1000' twice"),
        ("scienceqa", "pid_splits.json", partial(repeat_in, "test"), r"number \d+ of 'test' in .* has the id '1000' once more"),
    ],
)
def test_what_stands_twice_is_refused(make, name, file, repeat, message):
    folder = make(name)
    (folder / file).write_text(repeat((folder / file).read_text()))
    with pytest.raises(BenchmarkError, match=message):
        look(name, folder)


def test_subjects_do_not_share_an_id(make):
    folder = make("mmmu")
    shutil.copyfile(folder / "Art" / "validation-0.parquet", folder / "Math" / "validation-0.parquet")
    with pytest.raises(BenchmarkError, match=r"row 1 of .*Math/validation-0.parquet has the id 'Art' once more, after row 1 of .*Art"):
        look("mmmu", folder)


def test_two_annotations_of_their_own_may_ask_the_same(make):
    """As published, the last record counts; the question may be in the questions file as often."""
    folder = make("textvqa")
    file = folder / "llava_textvqa_val_v051_ocr.jsonl"
    file.write_text(repeat_line(file.read_text(), 0))
    assert look("textvqa", folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name, files in WRITTEN.items() for file in files]
    + [("mme", "MME_Benchmark_release_version/color/0000.txt"), ("mme", "llava_mme.jsonl"), ("pope", "coco/coco_pope_random.json")]
    + [("textvqa", "TextVQA_0.5.1_val.json"), ("scienceqa", "problems.json"), ("scienceqa", "llava_test_CQM-A.json")],
)
def test_a_byte_that_is_no_text(make, name, file):
    folder = make(name)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content + b"\n\n\xe9")
    number = len(content.split(b"\n")) + 2
    # The questions of the digits are read as all data are, in parts, so no line is known.
    message = rf"{file} is no text in UTF-8" if name == "digits" else rf"line {number} of .*{file} is not UTF-8 text: it has the byte 0xe9"
    with pytest.raises(BenchmarkError, match=message):
        look(name, folder)


def drop(*keys):
    """Return a function that removes a path from the text of a JSON file."""

    def change(text):
        content = place = json.loads(text)
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", drop("annotations", 1), "question 2 of .* is not in v2_mscoco"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", drop("annotations", 1, "answers"), "annotation of question 2 .* has no 'answers'"),
        ("gqa", "testdev_balanced_questions.json", drop("2"), "question 2 of .* is not in"),
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda text: text.replace('"red"', "5", 1),
            "question 1 .* must have a string as 'answer'",
        ),
        ("vizwiz", "val.json", drop(1, "answerable"), "2.jpg of .* has no 'answerable'"),
        ("mmbench", "mmbench_dev_20230712.tsv", lambda text: text.replace("no\tA\t", "no\tD\t"), "the answer 'D'"),
        (
            "seed-bench",
            "SEED-Bench.json",
            drop("questions", 1),
            "question 2 of .* has no 'answer', and SEED-Bench.json has none for it either",
        ),
        ("llava-bench", "context.jsonl", lambda text: text.splitlines()[0], "question 2 of .* no picture that context.jsonl describes"),
        ("llava-bench", "answers_gpt4.jsonl", lambda text: text.splitlines()[0], "question 2 of .* has no answer in answers_gpt4.jsonl"),
        ("mm-vet", "mm-vet.json", drop("v1_2"), "no entry 'v1_2' for question 2"),
        ("mm-vet", "mm-vet.json", drop("v1_2", "capability"), "v1_2 of .* has no 'capability'"),
        ("digits", "test.json", drop(1, "family"), "record 1 of .* has no 'family'"),
        ("digits", "test.json", lambda text: '{"a": 1}', "line 1 of .* must have 'conversations'"),
        ("mme", "MME_Benchmark_release_version/color/0000.txt", lambda text: "", "has no answer in .*color"),
        ("mme", "MME_Benchmark_release_version/posters/questions_answers_YN/0000.txt", lambda text: "x\tmaybe", "line 1 of .* Yes or No"),
        ("mme", "llava_mme.jsonl", lambda text: lines(r for r in map(json.loads, text.splitlines()) if r["category"] != "OCR"), "tasks"),
        ("textvqa", "TextVQA_0.5.1_val.json", drop("data", 5), "is not in TextVQA_0.5.1_val.json"),
        ("pope", "coco/coco_pope_random.json", lambda text: text.split("\n", 1)[1], "has no label in coco_pope_random.json"),
        ("pope", "llava_pope_test.jsonl", lambda text: text.replace('"image"', '"picture"', 1), "question 1 of .* has no image"),
        ("scienceqa", "problems.json", drop("1000", "choices"), "problem 1000 of .* has no 'choices'"),
        ("scienceqa", "problems.json", lambda text: "[]", "problems.json must be an object"),
    ],
)
def test_incomplete_ground_truth_is_known_before_a_question_is_asked(make, name, file, change, message):
    folder = make(name)
    assert look(name, folder)
    (folder / file).write_text(change((folder / file).read_text()))
    with pytest.raises(BenchmarkError, match=message):
        look(name, folder)


def test_a_missing_task_is_told_before_a_model_is_loaded(make, tiny_base, tmp_path, monkeypatch):  # noqa: F811
    """The command reports it; hidden files that macOS writes beside others are skipped."""
    folder = make("mme")
    release = folder / "MME_Benchmark_release_version"
    for question in find_benchmark("mme").questions(folder):
        question.images[0].parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 48)).save(question.images[0])
    for file in [*release.rglob("*.txt")]:
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07\xb0")
    prepare(find_benchmark("mme"), folder)
    monkeypatch.setattr("moe_llava.evaluation.evaluate.load_for_inference", None)
    command = ["evaluate", tiny_base / "base", "--benchmark", "mme", "--data", folder, "--out", tmp_path / "out"]
    shutil.move(release / "color", release / "colour")
    assert "MME_Benchmark_release_version/color: answers and images of color" in refused(*command)
    shutil.move(release / "colour", release / "color")
    (release / "color" / "0000.txt").write_text("Is it red?\tperhaps\n")
    assert "color/0000.txt must be a question, a tab, and Yes or No" in refused(*command)
    assert not (tmp_path / "out").exists()


def seed(folder, **changes):
    file = folder / "llava-seed-bench.jsonl"
    file.write_text(lines(record | changes for record in read_json_lines(file)))


def test_answers_of_seed_bench(make):
    """They are in the questions, in SEED-Bench.json, or in both if they agree."""
    folder = make("seed-bench")
    benchmark, questions = look("seed-bench", folder)
    found = result(benchmark, benchmark.score(folder, questions, ["B", "A"]), questions, ["B", "A"])
    assert found["scores"]["total"] == 50
    seed(folder, answer="B")
    assert look("seed-bench", folder)
    seed(folder, answer="C")
    with pytest.raises(BenchmarkError, match=r"question 1 of .*jsonl has the answer 'C', but SEED-Bench.json has 'B'"):
        look("seed-bench", folder)
    (folder / "SEED-Bench.json").unlink()
    benchmark, questions = look("seed-bench", folder)
    assert benchmark.score(folder, questions, ["C", "C"]).items[0]["right"]
    seed(folder, answer=None)
    with pytest.raises(BenchmarkError, match=r"SEED-Bench needs in .*\n  SEED-Bench.json: the answers, which not all questions"):
        look("seed-bench", folder)


@pytest.mark.parametrize("name", ["vqav2", "gqa", "seed-bench", "mm-vet", "digits"])
def test_a_question_is_answered_once(make, name):
    folder = make(name)
    _, questions = look(name, folder)
    first, second = ({"question_id": question.id, "prompt": question.prompt, "text": "red"} for question in questions[:2])
    for again in (first, first | {"text": "blue"}):
        with pytest.raises(BenchmarkError, match=r"answer 3 of .* answers question '1' once more, with '(red|blue)'; answer 1 of .*"):
            pair(questions, [first, second, again], folder / "answers.jsonl")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"question_id": 1, "prediction": "red", "answer": "blue"}, "answer 1 of .* has 'answer' and 'prediction', which differ"),
        ({"text": "red"}, "answer 1 of .* has no 'question_id', but 'text'"),
    ],
)
def test_answers_that_can_be_read_in_two_ways(make, answer, message):
    folder = make("gqa")
    with pytest.raises(BenchmarkError, match=message):
        pair(look("gqa", folder)[1], [answer], folder / "answers.jsonl")


@pytest.mark.parametrize("token", ["</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>"])
def test_end_tokens_in_answers_are_reported(make, token):
    """They count as part of the answer."""
    folder = make("gqa")
    (folder / "answers.jsonl").write_text(lines([{"question_id": 1, "text": f"red{token}\n"}, {"question_id": 2, "text": "red"}]))
    found = score_answers("gqa", folder, folder / "answers.jsonl")
    assert found["end_tokens"] == {token: 1}
    assert found["scores"]["accuracy"] == 50


@pytest.mark.parametrize("prices", [(float("nan"), 1.0), (1.0, float("inf")), (-1.0, 1.0)])
def test_prices_are_numbers(make, prices):
    folder = make("mm-vet")
    with pytest.raises(BenchmarkError, match=r"--prices is .*, but must be two numbers from 0"):
        judge_answers("mm-vet", folder, folder / "answers.jsonl", "http://localhost:1/v1", "m", prices)
