"""MMMU: Parquet files by subject, images in their places in the prompt, answers read as by the published script."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result
from moe_llava.evaluation.score.definitions.mmmu import DISCIPLINE, DISCIPLINES, matches, read_letter, read_open
from moe_llava.evaluation.score.questions import LETTER, SINGLE_WORD, pair
from moe_llava.evaluation.score.reading import BenchmarkError

MMMU = find_benchmark("mmmu")
OPTIONS = {"A": "red", "B": "dark red", "C": "None", "D": "NA"}


def row(subject, number=1, **changes):
    base = {"id": f"validation_{subject}_{number}", "question": "What is it? <image 1>", "options": "['red', \"it's\"]", "answer": "A"}
    base |= {"question_type": "multiple-choice", "image_1": {"bytes": b"one", "path": "1.png"}}
    return base | {f"image_{n}": None for n in range(2, 8)} | changes


def write(folder, rows):
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fields = [(name, pa.string()) for name in ("id", "question", "options", "answer", "question_type")]
    table = pa.Table.from_pylist(rows, pa.schema([*fields, *((f"image_{n}", image) for n in range(1, 8))]))
    folder.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table, folder / "validation-00000-of-00001.parquet")


@pytest.fixture
def folder(tmp_path):
    for subject in DISCIPLINE:
        write(tmp_path / "MMMU" / subject, [row(subject)])
    return find_folder(MMMU, tmp_path)


def asked(folder, texts):
    questions = MMMU.questions(folder)
    return questions, pair(questions, [{"question_id": name, "text": text} for name, text in texts.items()], folder / "answers")[0]


def scores(folder, texts):
    questions, given = asked(folder, texts)
    return result(MMMU, MMMU.score(folder, questions, given), questions, given)


def test_disciplines():
    assert len(DISCIPLINE) == sum(map(len, DISCIPLINES.values())) == 30


def test_scores_by_discipline(folder):
    """Art has two questions: the means are over questions, not over subjects."""
    write(folder / "Art", [row("Art"), row("Art", 2, question_type="open", options="[]", answer="['$MgS$', 'MgS']")])
    found = scores(folder, {"validation_Art_1": "A", "validation_Art_2": "It is MgS.", "validation_Math_1": "(b) it's"})
    assert len(found["missing"]) == 28
    values = found["scores"]
    assert values["accuracy"] == 2 / 31 * 100
    assert values["discipline/Art and Design"] == 2 / 5 * 100
    assert values["subject/Art"] == 100
    assert values["discipline/Science"] == values["subject/Math"] == 0


def test_lenient_reading_is_reported_where_it_differs(folder):
    values = scores(folder, {"validation_Math_1": "a."})["scores"]
    assert (values["subject/Math"], values["subject/Math (lenient)"]) == (0, 100)


def test_images_stand_where_the_prompt_says(folder):
    images = {f"image_{n}": {"bytes": bytes([n]), "path": None} for n in (1, 2, 3, 4)}
    rows = [
        row("Art", question="See <image 2>.", options="['<image 3>', '<image 1>']", **images),
        row("Art", 2, question="How many?", question_type="open", options="[]", answer="3"),
    ]
    write(folder / "Art", rows)
    first, second = (question for question in MMMU.questions(folder) if question.extra["subject"] == "Art")
    assert first.prompt == "<image>\nSee <image>.\n(A) <image>\n(B) <image>\n" + LETTER
    assert [image.open().read()[0] for image in first.images] == [4, 2, 3, 1]
    assert second.prompt == "<image>\nHow many?" + SINGLE_WORD
    assert [str(image) for image in second.images] == ["validation_Art_2_1"]


def test_files_saved_by_datasets(folder):
    import datasets

    file = folder / "Art" / "validation-00000-of-00001.parquet"
    saved = datasets.DatasetDict({"validation": datasets.Dataset(pa.parquet.read_table(file))})
    before = MMMU.questions(folder)
    file.unlink()
    saved.save_to_disk(folder / "Art")
    assert MMMU.questions(folder) == before


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or (B)", "B"),
        ("A is wrong, so (C)", "C"),
        ("I say A then B here", "B"),
        ("red", None),
        ("It seems to me that it is None", "C"),
        ("b", None),
        ("", None),
        ("\t\n", None),
    ],
)
def test_reading_letters(text, letter):
    assert read_letter(text, OPTIONS) == letter


def test_the_last_of_several_options_texts_counts():
    assert read_letter("It may be dark red but I see blue", {"A": "blue", "B": "dark red"}) == "A"
    assert read_letter("I think that it is a dark red", OPTIONS) == "A"  # "red" begins later than "dark red", as published


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("The answer is 1,234.567", "1234.57", True),
        ("x = 2 + 3 = 5", "5", True),
        ("about 1.5e3 units", "1500", True),
        ("12", "1", False),
        ("Therefore it is the mitochondrion.", "Mitochondrion", True),
        ("It is MgO", "MgS", False),
        ("a", "a", True),
        ("banana", "a", False),
        ("first\nso the result is blue", "blue", True),
        ("nan", "5", False),
        ("inf", "5", False),
        ("", "5", False),
        ("It is [1, 2]", "[1, 2]", True),
        ("1", "[1, 2]", False),
    ],
)
def test_open_answers(text, expected, right):
    assert matches(read_open(text), expected) is right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "See <image 2>"}, r"row 1 of .*Art.validation-00000-of-00001.parquet mentions <image 2>, but has no image_2"),
        ({"options": "red, blue"}, "has the options 'red, blue', but must have a list of texts"),
        ({"question_type": "essay"}, "has the question_type 'essay', but must have multiple-choice or open"),
        ({"answer": "C"}, "question validation_Art_1 of .*Art has the answer 'C', but the options A, B"),
    ],
)
def test_damaged_rows(folder, changes, message):
    write(folder / "Art", [row("Art", **changes)])
    with pytest.raises(BenchmarkError, match=message):
        scores(folder, {})


def test_a_subject_without_files(folder):
    (folder / "Art" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(BenchmarkError, match=r"Art must have files validation\*.parquet or validation/\*.arrow, but has neither"):
        MMMU.questions(folder)
