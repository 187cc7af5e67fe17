"""MMBench: a table in which "None" is an option and an image a cell; a question is right if all its rotations are."""

import base64
import csv

import pytest
from openpyxl import load_workbook

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result, split_in
from moe_llava.evaluation.score.definitions.mmbench import read, upload_rows
from moe_llava.evaluation.score.questions import LETTER, pair
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.scoring import score_answers
from moe_llava.evaluation.stress.perturb import Perturbation
from moe_llava.evaluation.stress.robustness import robustness

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment", "split"]
IMAGE = b"\x89PNG" + bytes(200_000)
TABLES = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench-cn": "mmbench_dev_cn_20231003.tsv"}


def row(index, answer, options, question="Which?", hint="", category="ocr"):
    cells = dict(zip("ABCD", [*options, "", ""], strict=False)) | {"index": index, "question": question, "hint": hint, "answer": answer}
    cells |= {"category": category, "image": base64.b64encode(IMAGE).decode(), "source": "web", "l2-category": "perception"}
    return [cells.get(column, "") for column in COLUMNS]


ROWS = [
    row(7, "A", ["None", "NA", "null", "red"], question='A "tab"\tand a\nnew line', hint="Look."),
    row(1_000_007, "D", ["NA", "null", "red", "None"]),
    row(8, "B", ["yes", "no"], category="identity"),
    row(1_000_008, "A", ["no", "yes"], category="identity"),
]


def write(folder, name="mmbench", rows=ROWS, columns=COLUMNS):
    place = folder / name.replace("-", "_")
    place.mkdir()
    with (place / TABLES[name]).open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows([columns, *rows])
    return place


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


def asked(folder, *texts, name="mmbench"):
    questions = find_benchmark(name).questions(folder)
    answers = [{"question_id": question.id, "text": text} for question, text in zip(questions, texts, strict=False)]
    return questions, pair(questions, answers, folder / "answers")[0]


def scores(folder, *texts):
    benchmark = find_benchmark("mmbench")
    questions, given = asked(folder, *texts)
    return result(benchmark, benchmark.score(folder, questions, given), questions, given)


def test_questions(folder, tmp_path):
    assert find_folder(find_benchmark("mmbench"), tmp_path) == folder
    first, _, third, _ = find_benchmark("mmbench").questions(folder)
    assert first.prompt == 'Look.\nA "tab"\tand a\nnew line\nA. None\nB. NA\nC. null\nD. red' + LETTER
    assert third.prompt == "Which?\nA. yes\nB. no" + LETTER
    assert first.id == "7"
    assert first.images[0].open().read() == IMAGE


def test_chinese_questions(tmp_path):
    folder = write(tmp_path, "mmbench-cn", [row(7, "A", ["红色", "蓝色"], question="什么颜色")])
    [question], _ = asked(folder, name="mmbench-cn")
    assert question.prompt == "什么颜色\nA. 红色\nB. 蓝色\n请直接回答选项字母。"


def test_a_question_is_right_if_all_rotations_are(folder):
    """Three of four rows are right, and one of two questions: the one about reading."""
    found = scores(folder, "A", "D.", "B", "B")["scores"]
    assert found == {"accuracy": 50, "category/ocr": 100, "category/identity": 0, "l2-category/perception": 50}


def test_items_are_what_the_benchmark_counts(folder):
    """Noise makes the other rotation of the half-wrong second question wrong: robustness has both accuracies."""
    benchmark = find_benchmark("mmbench")
    clean, noisy = (benchmark.score(folder, *asked(folder, *texts)) for texts in (("A", "D", "B", "B"), ("A", "C", "A", "B")))
    assert [(item["id"], item["given"], item["right"]) for item in clean.items] == [("7", ["A", "D"], True), ("8", ["B", "B"], False)]
    found = robustness(clean.items, {Perturbation("noise", 1): noisy.items}, clean.units)
    assert (found["clean"]["mean"], found["clean"]["n"]) == (0.5, 2)
    assert found["drops"][0]["right"] == 0
    assert split_in(benchmark, folder) is benchmark


def test_lenient_reading_is_reported_where_it_differs(folder):
    found = scores(folder, "A", "D", "选B", "__A__")["scores"]
    assert (found["accuracy"], found["accuracy (lenient)"]) == (50, 100)


def test_a_missing_answer_is_named_and_makes_its_question_wrong(folder):
    found = scores(folder, "A", "D", "B")
    assert found["missing"] == ["1000008"]
    assert found["scores"]["accuracy"] == 50


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A", "A"), ("(B).", "B"), ("The answer is C", "C"), ("A or B", None), ("None", "A"), ("NA", "B"), ("it is RED", "D"), ("", None)],
)
def test_reading(text, letter):
    assert read(text, {"A": "None", "B": "NA", "C": "null", "D": "red"}) == letter


def test_without_answers_only_the_server_can_score(tmp_path):
    at = COLUMNS.index("answer")
    folder = write(tmp_path, rows=[cells[:at] + cells[at + 1 :] for cells in ROWS], columns=COLUMNS[:at] + COLUMNS[at + 1 :])
    benchmark = find_benchmark("mmbench")
    assert split_in(benchmark, folder).score is None
    (folder / "answers.jsonl").write_text('{"question_id": 7, "text": "A"}')
    with pytest.raises(BenchmarkError, match="is scored by a server only"):
        score_answers("mmbench", folder, folder / "answers.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0][:5]], r"row 1 of .*mmbench_dev_20230712.tsv has 5 cells, but must have 14: index, question"),
        ([ROWS[0], row("x", "A", ["a", "b"])], r"row 2 of .* has the index 'x', but must have a number"),
        (
            [["not base64" if column == "image" else cell for column, cell in zip(COLUMNS, ROWS[0], strict=True)]],
            r"row 1 of .* has an image that is not base64",
        ),
        ([row(7, "E", ["a", "b"])], r"question 7 of .* has the answer 'E', but the options A, B"),
    ],
)
def test_damaged_tables(tmp_path, rows, message):
    folder = write(tmp_path, rows=rows)
    with pytest.raises(BenchmarkError, match=message):
        scores(folder)


def test_upload_has_the_columns_that_the_server_takes(folder):
    rows = upload_rows(*asked(folder, "A\tx\n", "=1", "None"))
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows[1] == [7, 'A "tab"\tand a\nnew line', "None", "NA", "null", "red", "A\tx\n", "A", ""]
    assert [row[6] for row in rows[2:]] == ["=1", "None", ""]


def test_upload(folder, tmp_path):
    [file] = find_benchmark("mmbench").upload(folder, *asked(folder, "A\x00", "=1", "None"), tmp_path)
    rows = list(load_workbook(file).active.values)
    assert rows[0][6] == "prediction"
    assert [row[0] for row in rows[1:]] == [7, 1_000_007, 8, 1_000_008]
    assert [row[6] or "" for row in rows[1:]] == ["A", "=1", "None", ""]
